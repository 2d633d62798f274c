#include <exception>
#include <vector>

#include "common/cpu/call.h"
#include "common/cpu/isa.h"
#include "common/cpu/pool.h"
#include "common/scalars.h"
#include "common/sizes.h"
#include "common/tensors.h"

// Part of the stable ABI since torch 2.11; weak, so that the same binary loads under 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* deleter_context);

namespace throughtime {
namespace {

// Below, malloc recycles memory as well as the pool does, and torch's own tensors can be resized.
constexpr size_t kLeastPooled = size_t(1) << 18;

template <typename S>
void add(const Tensor& a, const Tensor& b, const Tensor& sum) {
  const S *from = data<S>(a), *other = data<S>(b);
  S* to = mutable_data<S>(sum);
  for (int64_t i = 0, count = sum.numel(); i < count; ++i) to[i] = from[i] + other[i];
}

}  // namespace

Tensor pooled(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.begin(), sizes.size());
  int64_t count = 1;
  double exact = bytes_of(dtype);
  for (int64_t size : sizes) {
    count = times(count, size);
    exact *= static_cast<double>(size);
  }
  if (count == kTooMany) out_of_memory(exact);
  const size_t bytes = count * bytes_of(dtype);
  if (!torch_from_blob || bytes < kLeastPooled) {
    try {
      return torch::stable::empty(shape, dtype);
    } catch (const std::exception&) {
      out_of_memory(bytes);
    }
  }

  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= shape[i]) strides[i] = stride;
  const int32_t dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  void* const memory = acquire(bytes);
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status = torch_from_blob(
      memory, shape.size(), shape.data(), strides.data(), 0, dtype_code,
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void*) { pool_release(data); }, nullptr);
  if (status != TORCH_SUCCESS) {
    pool_release(memory);
    TT_CHECK(false, "throughtime: torch did not take a tensor of ", count, " elements");
  }
  return Tensor(handle);
}

Tensor converted(const Tensor& tensor, ScalarType dtype) {
  const Tensor from = dense(tensor);
  if (from.scalar_type() == dtype) return from;
  const Tensor to = torch::stable::empty(tensor.sizes(), dtype);
  const auto convert = [](const auto* from, auto* to, int64_t count, auto one) {
    for (int64_t i = 0; i < count; ++i) to[i] = one(from[i]);
  };
  if (dtype == ScalarType::Float) {
    convert(data<BFloat16>(from), mutable_data<float>(to), to.numel(),
            [](BFloat16 x) { return wide(x); });
  } else {
    convert(data<float>(from), mutable_data<BFloat16>(to), to.numel(),
            [](float x) { return narrow(x); });
  }
  return to;
}

OptionalTensor converted(const OptionalTensor& tensor, ScalarType dtype) {
  return tensor ? OptionalTensor(converted(*tensor, dtype)) : std::nullopt;
}

OptionalTensor sum_of(const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  if (!bias_ih || !bias_hh) return dense(bias_ih ? bias_ih : bias_hh);
  const Tensor a = dense(*bias_ih), b = dense(*bias_hh);
  const Tensor sum = pooled({a.numel()}, a.scalar_type());
  if (a.scalar_type() == ScalarType::Float) {
    add<float>(a, b, sum);
  } else {
    add<double>(a, b, sum);
  }
  return sum;
}

ScalarType sums_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? ScalarType::Float : dtype;
}

void check_dtype(const char* argument, const Tensor& tensor, bool bfloat16) {
  if (tensor.scalar_type() != ScalarType::BFloat16) return check_real(argument, tensor);
  TT_CHECK_CALL(bfloat16, "bfloat16 needs AVX512-BF16 or AMX, and ", isa().name,
                " runs here; convert the tensors to float32, or trace or export the program "
                "again on this machine");
}

ScalarType weight_dtype(const Tensor& input, const Tensor& weight) {
  const ScalarType dtype = input.scalar_type(), sums = sums_of(dtype);
  return weight.defined() && weight.scalar_type() == sums ? sums : dtype;
}

}  // namespace throughtime
