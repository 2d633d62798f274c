// The instances of the persistent and the stepwise kernels: what nvcc makes of the device code.
#include "persistent.cuh"
#include "stepwise.cuh"

namespace throughtime {

// Names every instance, so that each is compiled.
template <typename S>
void instances(const RecurrencePlan& plan, const RecurrenceForward<S>& forward,
               const RecurrenceBackward<S>& backward, const void** kernel) {
  const auto take = [&](auto chosen, const auto&) {
    *kernel = reinterpret_cast<const void*>(chosen);
  };
  launch_persistent(plan, forward, take);
  launch_persistent(plan, backward, take);
  take(&lstm_step_forward<S>, 0);
  take(&lstm_step_backward<S>, 0);
}

template void instances(const RecurrencePlan&, const RecurrenceForward<float>&,
                        const RecurrenceBackward<float>&, const void**);
template void instances(const RecurrencePlan&, const RecurrenceForward<device::BFloat16>&,
                        const RecurrenceBackward<device::BFloat16>&, const void**);
template void instances(const RecurrencePlan&, const RecurrenceForward<device::Float16>&,
                        const RecurrenceBackward<device::Float16>&, const void**);

}  // namespace throughtime
