// The CUDA implementations of the ops: on pred's device and the stream that is current there.
#include "../ops.h"

#include <dlfcn.h>

#include "torch/csrc/stable/accelerator.h"

namespace gfl {
namespace {

// A torch without CUDA lacks this function, so the library must not name it to the linker. Python
// loads libtorch_cuda for itself alone, where RTLD_DEFAULT does not look.
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

CurrentStream current_stream() {
  static const CurrentStream function = [] {
    const char* const name = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, name);
    if (!found) {
      void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      if (torch_cuda) found = dlsym(torch_cuda, name);
    }
    return reinterpret_cast<CurrentStream>(found);
  }();
  return function;
}

class Cuda {
 public:
  explicit Cuda(const Tensor& pred)
      : index_(pred.get_device_index()), guard_(pred.get_device_index()) {
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

 private:
  // For a loss that is a sum. Torch's allocator gives it to nothing that could run beside the
  // launch: not on another stream, nor while a graph is replayed that was captured with it.
  class Workspace {
   public:
    Workspace(const Place& place, const gfl_view* loss) {
      if (!loss || loss->ndim > 0) return;
      const int64_t size = GFL_CUDA_WORKSPACE_BYTES / 8, stride = 1;
      memory_ = new_tensor(place, 1, &size, &stride, aoti_torch_dtype_float64());
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
