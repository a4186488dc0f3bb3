// The CUDA implementations of the ops: on pred's device and the stream that is current there.
#include "../stable.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include "torch/csrc/stable/accelerator.h"

namespace gfl {
namespace {

// What the process has loaded under a name of torch's CUDA library, or null. A torch without CUDA
// lacks it, so the library must not name it to the linker.
void* find_in_torch_cuda(const char* name) {
#if defined(_WIN32)
  const HMODULE torch_cuda = GetModuleHandleA("torch_cuda.dll");
  return torch_cuda ? reinterpret_cast<void*>(GetProcAddress(torch_cuda, name)) : nullptr;
#else
  if (void* const found = dlsym(RTLD_DEFAULT, name)) return found;
  // Python loads it for itself alone, where RTLD_DEFAULT does not look.
  void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch_cuda ? dlsym(torch_cuda, name) : nullptr;
#endif
}

using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

CurrentStream current_stream() {
  static const auto function =
      reinterpret_cast<CurrentStream>(find_in_torch_cuda("aoti_torch_get_current_cuda_stream"));
  return function;
}

class Cuda {
 public:
  static constexpr bool kSaves = false;
  template <typename... Others>
  explicit Cuda(const Tensor& pred, const Others&... others)
      : index_(pred.get_device_index()), guard_(pred.get_device_index()) {
    if (!(holds(pred) && ... && holds(others))) {
      throw std::invalid_argument("gfl_native: the tensors are not all on pred's CUDA device");
    }
    if (!current_stream())
      throw std::runtime_error("gfl_native: torch's current CUDA stream is not known");
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream()(index_, &stream_));
  }
  Place place() const { return {aoti_torch_device_type_cuda(), index_}; }

  int run(const gfl_quality_args& args) const {
    const Workspace workspace(place(), args.loss);
    return gfl_quality_cuda(&args, workspace.data(), stream_);
  }
  int run(const gfl_distribution_args& args) const {
    const Workspace workspace(place(), args.loss);
    return gfl_distribution_cuda(&args, workspace.data(), stream_);
  }
  int run(const gfl_integral_args& args) const { return gfl_integral_cuda(&args, stream_); }
  int run(const gfl_statistics_args& args) const { return gfl_statistics_cuda(&args, stream_); }
  int run(const gfl_moments_args& args) const { return gfl_moments_cuda(&args, stream_); }
  int run(const gfl_distillation_args& args) const {
    const Workspace workspace(place(), args.loss);
    return gfl_distillation_cuda(&args, workspace.data(), stream_);
  }
  int run(const gfl_decode_args& args) const { return gfl_decode_cuda(&args, stream_); }
  int run_boxes(const gfl_head_args& args) const {
    const int64_t bytes = gfl_head_cuda_workspace_bytes(&args);
    if (bytes < 0) return 1;
    const Workspace workspace(place(), bytes);
    return gfl_head_boxes_cuda(&args, workspace.data(), stream_);
  }
  int run(const gfl_head_args& args) const {
    const int64_t bytes = args.losses[0] ? gfl_head_cuda_workspace_bytes(&args) : 0;
    if (bytes < 0) return 1;
    const Workspace workspace(place(), bytes);
    return gfl_head_cuda(&args, workspace.data(), stream_);
  }

 private:
  bool holds(const Tensor& tensor) const {
    return tensor.is_cuda() && tensor.get_device_index() == index_;
  }
  bool holds(const std::optional<Tensor>& tensor) const { return !tensor || holds(*tensor); }
  bool holds(const std::vector<Tensor>& tensors) const {
    return std::all_of(tensors.begin(), tensors.end(),
                       [this](const Tensor& t) { return holds(t); });
  }

  // For sums. Torch's allocator gives it to nothing that could run beside the launch: not on
  // another stream, nor while a graph is replayed that was captured with it.
  class Workspace {
   public:
    Workspace(const Place& place, const gfl_view* loss)
        : Workspace(place, loss && loss->ndim == 0 ? GFL_CUDA_WORKSPACE_BYTES : 0) {}
    Workspace(const Place& place, int64_t bytes) {
      if (bytes == 0) return;
      const int64_t size = bytes / 8, stride = 1;
      memory_ = new_tensor(place, 1, &size, &stride, ScalarType::Double);
    }
    void* data() const { return memory_ ? memory_->data_ptr() : nullptr; }

   private:
    std::optional<Tensor> memory_;
  };

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace

GFL_IMPLEMENT(CUDA, Cuda)

}  // namespace gfl

extern "C" GFL_API int gfl_cuda_has_stream(void) { return gfl::current_stream() != nullptr; }
