/* AVX2: 32 weights are looked up in 16 tables of 16 values (in 4 for trellis5 blocks). */
#include "avx2.h"

#define NAME "avx2"
#define KERNELS bstack_avx2
#define DOTS 0
#define MASKS 0
#include "ymm.h"
