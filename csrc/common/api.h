// What _ops.so offers to the Python module beside it; all else in it is hidden.
#pragma once

#define EVAKERNELS_API __attribute__((visibility("default")))
