// The CPU implementations of the ops.
#include "../stable.h"
#include "device.h"

namespace gfl {

GFL_IMPLEMENT(CPU, Cpu)

}  // namespace gfl
