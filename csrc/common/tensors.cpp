#include "common/tensors.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "common/sizes.h"

namespace throughtime {

thread_local const char* running_operator = "kernels";

namespace {

std::string text(const int64_t* sizes, size_t count) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < count; ++i) out << (i ? ", " : "") << sizes[i];
  out << "]";
  return out.str();
}

// A schema's `Tensor` takes None too, as a tensor without anything.
void check_defined(const char* argument, const Tensor& tensor) {
  TT_CHECK_CALL(tensor.defined(), argument, " should be a tensor, got None");
}

void check_storage(const char* argument, const Tensor& tensor, ScalarType dtype) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t end = 1;  // numbers from the first to the last
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return;
    end += times(sizes[d] - 1, strides[d]);
  }
  int64_t offset = 0, held = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &held));
  const int64_t needed = times(offset + end, bytes_of(dtype));
  TT_CHECK_CALL(needed <= held, argument, " should lie in ", needed, " bytes of storage, got ",
                held, "; its storage was resized");
}

}  // namespace

void check_shape(const char* argument, const Tensor& tensor,
                 std::initializer_list<int64_t> wanted) {
  const auto sizes = tensor.sizes();
  bool equal = sizes.size() == wanted.size();
  for (size_t i = 0; equal && i < wanted.size(); ++i) equal = sizes[i] == wanted.begin()[i];
  for (size_t i = 0; equal && i < wanted.size(); ++i)
    TT_CHECK_CALL(sizes[i] < kTooMany, argument, " has shape ", text(sizes.data(), sizes.size()),
                  ", more than any memory can hold");
  TT_CHECK_CALL(equal, argument, " should have shape ", text(wanted.begin(), wanted.size()),
                ", got ", text(sizes.data(), sizes.size()));
}

void check_dtype(const char* argument, const Tensor& tensor, ScalarType wanted) {
  TT_CHECK_CALL(tensor.scalar_type() == wanted, argument, " should have dtype ",
                torch::headeronly::toString(wanted), ", got ",
                torch::headeronly::toString(tensor.scalar_type()));
}

void check_cpu(const char* argument, const Tensor& tensor) {
  TT_CHECK_CALL(tensor.is_cpu(), argument, " should be on the CPU, as the others are");
}

void check_dims(const char* argument, const Tensor& tensor, const char* letters) {
  check_defined(argument, tensor);
  const int64_t wanted = 1 + std::count(letters, letters + std::strlen(letters), ',');
  TT_CHECK_CALL(tensor.dim() == wanted, argument, " should be ", letters, ", got ", tensor.dim(),
                " dimensions");
}

void check_argument(const char* argument, const Tensor& tensor,
                    std::initializer_list<int64_t> wanted, ScalarType dtype) {
  check_defined(argument, tensor);
  check_cpu(argument, tensor);
  check_shape(argument, tensor, wanted);
  check_dtype(argument, tensor, dtype);
  check_storage(argument, tensor, dtype);
}

void check_argument(const char* argument, const OptionalTensor& tensor,
                    std::initializer_list<int64_t> wanted, ScalarType dtype) {
  if (tensor) check_argument(argument, *tensor, wanted, dtype);
}

void check_real(const char* argument, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  TT_CHECK_CALL(dtype == ScalarType::Float || dtype == ScalarType::Double, argument,
                " should be float32 or float64, got ", torch::headeronly::toString(dtype));
}

int64_t bytes_of(ScalarType dtype) {
  if (dtype == ScalarType::Bool) return 1;
  if (dtype == ScalarType::BFloat16) return 2;
  return dtype == ScalarType::Float ? 4 : 8;
}

Tensor dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  const auto contiguous = torch::headeronly::MemoryFormat::Contiguous;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(contiguous)};
  const auto status =
      torch_call_dispatcher("aten::contiguous", "", stack.data(), TORCH_ABI_VERSION);
  TT_CHECK(status == TORCH_SUCCESS,
           "throughtime: can't allocate memory for a contiguous copy of an argument of shape ",
           text(tensor.sizes().data(), tensor.dim()),
           ": pass a contiguous tensor, fewer steps or a smaller batch");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt;
}

void fill_zero(const Tensor& tensor) {
  if (tensor.numel() > 0) torch::stable::zero_(const_cast<Tensor&>(tensor));
}

void copy(const Tensor& from, const Tensor& to) {
  if (from.numel() > 0)
    std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), from.numel() * from.element_size());
}

}  // namespace throughtime
