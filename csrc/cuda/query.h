/* What a device is, as far as the kernels care. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t driver;     /* newest CUDA that the driver knows: 13000 for 13.0; 0 where there is no driver */
    int32_t devices;    /* that the driver shows */
    int32_t capability; /* of the device asked for: 89 for 8.9 */
    int32_t processors; /* multiprocessors */
} cfrt_device;

/* Returns a cudaError_t; what is known before it failed is filled in. */
int cfrt_query_device(int32_t index, cfrt_device* out);

#ifdef __cplusplus
}
#endif
