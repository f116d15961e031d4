"""The ops' accuracy on every instruction set and on the references: those that the other tests don't run on."""

import pytest
from op_suite import CHOICE, run_ops

import evakernels

pytestmark = pytest.mark.exhaustive

NATIVE = evakernels.info()["native"]
OTHER_ISAS = [isa for isa in NATIVE.get("isas_available", []) if isa != NATIVE["isa"]]


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE["loaded"], reason=f"there are no compiled kernels: {NATIVE['reason']}")
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_instruction_set(isa: str) -> None:
    run_ops(EVAKERNELS_ISA=isa)


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE["loaded"], reason="the other tests run on the references already")
def test_reference() -> None:
    # Some tests are of the kernels' own tiles and polynomials.
    run_ops("with evakernels.use_backend('reference')", choice=f"({CHOICE}) and not several_tiles and not 16_bits")
