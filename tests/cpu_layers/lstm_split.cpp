// lstm/cpu/split_kernels.cpp and float32.cpp: the LSTM on float32 in bfloat16 parts, by AMX or a
// stand-in for it, beside the vector kernels.
#include "export.h"
#include "lstm/cpu/float32.cpp"
#include "lstm/cpu/split_kernels.cpp"
#include "walk_calls.h"

using namespace throughtime;

namespace {

// float32 alone: the others would double the time of compiling.
const LstmKernels kVectors = {{[](const LstmForward<float>& args, const Runtime& runtime) {
                                 ForwardWalk<LstmCell<float>>(args, runtime).run(runtime);
                               },
                               nullptr},
                              {[](const LstmBackward<float>& args, const Runtime& runtime) {
                                 BackwardWalk<LstmCell<float>>(args, runtime).run(runtime);
                               },
                               nullptr},
                              nullptr,
                              nullptr,
                              kVectorBytes};

// Of the parts that sizes[9] says; 0: the vector kernels.
struct Float32Kernels {
  static void run(const LstmForward<float>& pass, const int64_t* sizes, const Runtime& runtime) {
    if (sizes[9] == 0) return kVectors.forward(pass, runtime);
    run_split(TT_KERNELS(lstm_split), kVectors, static_cast<int>(sizes[9]), pass, runtime);
  }
  static void run(const LstmBackward<float>& pass, const int64_t* sizes, const Runtime& runtime) {
    if (sizes[9] == 0) return kVectors.backward(pass, runtime);
    run_split(TT_KERNELS(lstm_split), kVectors, static_cast<int>(sizes[9]), pass, runtime);
  }
};

// parts [3, L] as float32, and whether products take the numbers.
template <typename S>
int64_t split_numbers(const S* numbers, S* parts) {
  const FlushSubnormals flush;
  Numbers<SplitFloat<3>>::Words words[3];
  Numbers<SplitFloat<3>>::split(load(numbers), words);
  for (int part = 0; part < 3; ++part)
    store(parts + part * kLanes<S>, (Vec<S>)(words[part] & 0xffff0000u));
  return Numbers<SplitFloat<3>>::holds(load(numbers));
}

int64_t saved_size(const float*, const int64_t* sizes) {
  return saved_activations<float>(shape_of(sizes), sizes[7] != 0);
}

int64_t fits(int64_t T, int64_t B, int64_t I, int64_t H) {
  return fits_matrix_unit({T, B, I, H, H});
}

}  // namespace

EXPORT_AS(saved_size_f32, saved_size)
EXPORT_AS(forward_f32, run_forward<float, Float32Kernels>)
EXPORT_AS(backward_f32, run_backward<float, Float32Kernels>)
EXPORT_AS(split_f32, split_numbers<float>)
EXPORT_PLAIN(fits)
