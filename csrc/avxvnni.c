/* AVX2 with dot products of bytes. */
#define TARGET "avx2,avxvnni"
#include "kernels.h"

#ifdef BSTACK_AVXVNNI
#include "avx2.h"

#define NAME "avxvnni"
#define KERNELS bstack_avxvnni
#define DOTS 1
#define MASKS 0
#include "ymm.h"
#endif
