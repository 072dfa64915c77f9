// One scratch matrix per (device, dtype, stream), shared by all layers; see sltrain_ds/ops/workspace.py.

#include "layer.h"

#include <ATen/Functions.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <mutex>

namespace sltrain {
namespace {

using Key = std::tuple<c10::DeviceType, c10::DeviceIndex, at::ScalarType, c10::StreamId>;

std::mutex mutex;  // a GPU's backward runs in a separate thread

std::map<Key, at::Tensor>& buffers() {
  static auto* const held = new std::map<Key, at::Tensor>;  // never destroyed: the CUDA context may be gone by then
  return *held;
}

}  // namespace

at::Tensor workspace_take(int64_t rows, int64_t columns, at::ScalarType dtype, at::Device device) {
  c10::StreamId stream = 0;
  if (!device.is_cpu()) stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).id();
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& buffer = buffers()[{device.type(), device.index(), dtype, stream}];
  if (!buffer.defined() || buffer.numel() < rows * columns) {
    buffer.reset();  // free the smaller one before allocating the larger one
    buffer = at::empty({rows * columns}, at::TensorOptions().dtype(dtype).device(device));
  }
  return buffer.as_strided({rows, columns}, {columns, 1});
}

std::vector<at::Tensor> workspace_buffers() {
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<at::Tensor> found;
  for (const auto& [key, buffer] : buffers()) found.push_back(buffer);
  return found;
}

void workspace_release() {
  const std::lock_guard<std::mutex> lock(mutex);
  buffers().clear();
}

}  // namespace sltrain
