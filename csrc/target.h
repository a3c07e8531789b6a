/* Compile what follows, up to END_OF_TARGET, for TARGET: before all other headers, so that their inline functions are too. */
#define AS_TEXT(words) #words
#define PRAGMA(words) _Pragma(AS_TEXT(words))

#if defined(__x86_64__) && defined(__clang__)
PRAGMA(clang attribute push(__attribute__((target(TARGET))), apply_to = function))
#define END_OF_TARGET _Pragma("clang attribute pop")
#elif defined(__x86_64__) && defined(__GNUC__)
PRAGMA(GCC target(TARGET))
#define END_OF_TARGET
#endif
