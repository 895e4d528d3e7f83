// The driver's results that the library without a card gives, in its numbers and words.
#pragma once

#include <map>
#include <utility>

namespace simt {

constexpr int Success = 0, InvalidValue = 1, NotInitialized = 3, NoDevice = 100, InvalidDevice = 101,
              InvalidImage = 200, InvalidContext = 201, NoBinaryForGpu = 209, InvalidHandle = 400, NotFound = 500,
              LaunchOutOfResources = 701, LaunchFailed = 719, CaptureUnsupported = 900;
// In the driver's words. Of a failed launch another word is known, see `failure`.
inline const std::map<int, std::pair<const char *, const char *>> errors = {
    {InvalidValue, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {NotInitialized, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {NoDevice, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {InvalidDevice, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {InvalidImage, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {InvalidContext, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {NoBinaryForGpu, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {InvalidHandle, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {NotFound, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {LaunchOutOfResources, {"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"}},
    {LaunchFailed, {"CUDA_ERROR_LAUNCH_FAILED", ""}},
    {CaptureUnsupported, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}},
};

} // namespace simt
