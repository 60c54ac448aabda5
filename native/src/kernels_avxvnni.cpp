// int8 dot products in 16 registers of 256 bits.
#define MPQDM_PIXELS 6
#define MPQDM_DOT _mm256_dpbusd_avx_epi32
#define MPQDM_KERNELS kAvxVnniKernels
#define MPQDM_NAME "avxvnni"
#include "kernels_vnni.inc"
