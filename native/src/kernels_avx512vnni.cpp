// int8 dot products in 32 registers of 256 bits.
#define MPQDM_PIXELS 8
#define MPQDM_DOT _mm256_dpbusd_epi32
#define MPQDM_KERNELS kAvx512VnniKernels
#define MPQDM_NAME "avx512vnni"
#include "kernels_vnni.inc"
