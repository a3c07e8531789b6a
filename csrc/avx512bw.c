/* AVX-512BW and VL without VBMI and VNNI, in registers of 256 bits. */
#define TARGET "avx2,avx512f,avx512bw,avx512vl"
#include "avx2.h"

#define NAME "avx512bw"
#define KERNELS bstack_avx512bw
#define DOTS 0
#define MASKS 1
#include "ymm.h"
