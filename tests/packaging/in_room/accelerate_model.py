"""A model of torch's own modules on the ops of this library and back, with the same result."""

import torch
from torch import nn

import evakernels

torch.manual_seed(0)
model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
x = torch.randn(4, 32)
expected, keys = model(x), list(model.state_dict())
print(evakernels.accelerate(model))
assert type(model[0]) is not nn.LayerNorm
assert list(model.state_dict()) == keys
torch.testing.assert_close(model(x), expected)
evakernels.restore(model)
assert type(model[0]) is nn.LayerNorm
