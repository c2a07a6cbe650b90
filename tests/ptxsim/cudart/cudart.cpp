// Stands in for libcudart: what nvcc's host code and a launcher call, with kernels sent to the executor. Python sets
// the functions that do the work (runtime.py); this file keeps CUDA's own state: names, attributes, the last error.
// Declarations are ours, after the CUDA runtime API 13.0: the toolkit's headers would bring inline twins of some.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {

enum Error { kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kInvalidDevice = 101, kInvalidFunction = 98 };
enum Attribute {
    kMaxThreads = 1,
    kMaxShared = 8,
    kMultiprocessors = 16,
    kMajor = 75,
    kMinor = 76,
    kMaxSharedOptin = 97
};

struct Dim3 {
    unsigned x, y, z;
};
struct Device {
    int multiprocessors, major, minor, max_threads, max_shared, max_shared_optin;
};
// Returns a cudaError_t.
using LaunchFunction = int (*)(const char* name, const Dim3* grid, const Dim3* block, void** arguments,
                               std::size_t shared);

Device device{128, 8, 9, 1024, 49152, 101376};
LaunchFunction launch_function = nullptr;
std::map<const void*, std::string> names;
std::map<const void*, int> dynamic_shared;  // cudaFuncAttributeMaxDynamicSharedMemorySize
int last_error = kSuccess;

struct Configuration {
    Dim3 grid, block;
    std::size_t shared;
    void* stream;
};
thread_local Configuration pushed;

int fail(int error) {
    return last_error = error;
}

bool valid(const Dim3& grid, const Dim3& block) {
    const std::uint64_t threads = std::uint64_t(block.x) * block.y * block.z;
    const std::uint64_t blocks = std::uint64_t(grid.x) * grid.y * grid.z;
    return threads && threads <= std::uint64_t(device.max_threads) && block.z <= 64 && blocks &&
           grid.x <= 0x7fff'ffffu && grid.y <= 65535 && grid.z <= 65535;
}

int launch(const void* function, Dim3 grid, Dim3 block, void** arguments, std::size_t shared) {
    const auto name = names.find(function);
    if (name == names.end()) return fail(kInvalidFunction);
    if (!valid(grid, block)) return fail(kInvalidConfiguration);
    const auto allowed = dynamic_shared.find(function);
    const int limit =
        allowed == dynamic_shared.end() ? device.max_shared : std::max(device.max_shared, allowed->second);
    if (shared > std::size_t(limit)) return fail(kInvalidValue);
    if (!launch_function) return fail(kInvalidDevice);
    const int error = launch_function(name->second.c_str(), &grid, &block, arguments, shared);
    return error ? fail(error) : kSuccess;
}

}  // namespace

extern "C" {

void ptxsim_cudart_connect(LaunchFunction function, const Device* as) {
    launch_function = function;
    device = *as;
    last_error = kSuccess;
}

// What nvcc writes into host code.
void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) {
    return 1;
}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    names[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, std::size_t shared, void* stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, std::size_t* shared, void* stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *static_cast<void**>(stream) = pushed.stream;
    return kSuccess;
}
int __cudaGetKernel(const void** kernel, const void* function) {
    *kernel = function;
    return kSuccess;
}
int __cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, std::size_t shared, void*) {
    return launch(function, grid, block, arguments, shared);
}
int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, std::size_t shared, void*) {
    return launch(function, grid, block, arguments, shared);
}

// What launchers call.
int cudaFuncSetAttribute(const void* function, int attribute, int value) {
    constexpr int kMaxDynamicShared = 8, kCarveout = 9;
    if (!names.count(function)) return fail(kInvalidFunction);
    if (attribute == kCarveout) return kSuccess;
    if (attribute != kMaxDynamicShared || value < 0 || value > device.max_shared_optin) return fail(kInvalidValue);
    dynamic_shared[function] = value;
    return kSuccess;
}
int cudaGetLastError() {
    const int error = last_error;
    last_error = kSuccess;
    return error;
}
int cudaPeekAtLastError() {
    return last_error;
}
const char* cudaGetErrorName(int error) {
    switch (error) {
        case kSuccess:
            return "cudaSuccess";
        case kInvalidValue:
            return "cudaErrorInvalidValue";
        case kInvalidConfiguration:
            return "cudaErrorInvalidConfiguration";
        case kInvalidFunction:
            return "cudaErrorInvalidDeviceFunction";
        case kInvalidDevice:
            return "cudaErrorInvalidDevice";
        case 719:
            return "cudaErrorLaunchFailure";
    }
    return "an error that ptxsim's runtime does not name";
}
const char* cudaGetErrorString(int error) {
    return cudaGetErrorName(error);
}
int cudaDriverGetVersion(int* version) {
    *version = 13000;
    return kSuccess;
}
int cudaGetDevice(int* which) {
    *which = 0;
    return kSuccess;
}
int cudaGetDeviceCount(int* count) {
    *count = 1;
    return kSuccess;
}
int cudaSetDevice(int which) {
    return which == 0 ? kSuccess : fail(kInvalidDevice);
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case kMaxThreads:
            *value = device.max_threads;
            return kSuccess;
        case kMaxShared:
            *value = device.max_shared;
            return kSuccess;
        case kMultiprocessors:
            *value = device.multiprocessors;
            return kSuccess;
        case kMajor:
            *value = device.major;
            return kSuccess;
        case kMinor:
            *value = device.minor;
            return kSuccess;
        case kMaxSharedOptin:
            *value = device.max_shared_optin;
            return kSuccess;
    }
    return fail(kInvalidValue);
}
int cudaDeviceSynchronize() {
    return last_error;
}
int cudaStreamSynchronize(void*) {
    return last_error;
}
int cudaMemsetAsync(void* to, int value, std::size_t bytes, void*) {
    std::memset(to, value, bytes);
    return kSuccess;
}
int cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, int, void*) {
    std::memmove(to, from, bytes);
    return kSuccess;
}
}
