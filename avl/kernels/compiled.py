"""How compiled kernels are compiled, and instructions that Python has no name for.

Imported only where numba is installed and a kernel is about to run, as importing numba takes a
while. Nothing here asks for a particular processor: LLVM vectorises the loops with whatever the
processor has, and numba's cache on disk keeps one version for each kind of processor.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import float32, int32, int64, njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

SUMMING = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be reordered, which is what lets a loop be vectorised. Not a numbers and infinities stay
what they are, so that a model's broken numbers reach the result.
"""


def _sources() -> str:
    """What tells one state of the kernels' sources from another."""
    digest = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _sources()


class _Cache(FunctionCache):
    """numba's cache on disk, with entries of their own for each state of the kernels' sources.

    The machine code of a function contains that of what it calls, and numba only notices changes of
    the file the function itself is in.
    """

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return *super()._index_key(sig, codegen), _SOURCES


def kept_on_disk(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile functions at their first call and keep them; they release Python's lock.

    Args:
        options: of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        dispatcher._cache = _Cache(function)
        return dispatcher

    return decorate


compiled = kept_on_disk(fastmath=SUMMING)
"""Compile a function at its first call, release Python's lock while it runs, and keep it on disk.
"""

# ln(2)^n / n!, the Taylor series of 2^x; on [-0.5, 0.5] what is left out after n = 6 is below
# 1.3e-7.
_C1, _C2, _C3 = 0.6931471805599453, 0.2402265069591007, 0.05550410866482158
_C4, _C5, _C6 = 0.009618129107628477, 0.0013333558146428443, 0.00015403530393381608
_LEAST = -126.0
"""Powers below this are not normal float32 numbers; they count as 0."""


def _one_argument(name: str) -> Any:
    """LLVM's intrinsic function of this name, float32 -> float32."""

    @intrinsic
    def call(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number = ir.FloatType()
            function = builder.module.declare_intrinsic(
                name, [number], ir.FunctionType(number, [number])
            )
            return builder.call(function, arguments)

        return float32(float32), generate

    return call


nearest = _one_argument("llvm.roundeven")
"""The nearest whole number."""


@intrinsic
def larger(context: Any, one: Any, other: Any) -> Any:
    """The larger of two float32 numbers; which, if one is not a number, is left open.

    A comparison written in Python is not vectorised when it reduces a row, as it must treat NaN as
    Python does.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.FloatType()
        function = builder.module.declare_intrinsic(
            "llvm.maxnum", [number], ir.FunctionType(number, [number, number])
        )
        return builder.call(function, arguments, fastmath=("nnan", "nsz"))

    return float32(float32, float32), generate


@intrinsic
def smaller(context: Any, one: Any, other: Any) -> Any:
    """The smaller of two float32 numbers; see `larger`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.FloatType()
        function = builder.module.declare_intrinsic(
            "llvm.minnum", [number], ir.FunctionType(number, [number, number])
        )
        return builder.call(function, arguments, fastmath=("nnan", "nsz"))

    return float32(float32, float32), generate


@intrinsic
def bits_of(context: Any, value: Any) -> Any:
    """The 32 bits of a float32 number as an integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return int32(float32), generate


@intrinsic
def from_bits(context: Any, value: Any) -> Any:
    """The float32 number with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return float32(int32), generate


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """The memory at an address, for `carray`.

    A tensor's address is a number, which reaches a compiled function in a tenth of the time that
    its array takes. Whoever passes it keeps the tensor alive.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(int64), generate


@intrinsic
def as_float32(context: Any, stored: Any) -> Any:
    """A stored number as float32: float32 itself, or bfloat16 as its 16 bits.

    numba compiles a caller once for each type of array, and this is then what fits the type.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if stored == types.float32:
            return arguments[0]
        wide = ir.IntType(32)
        # A bfloat16 number is the upper half of a float32 number's bits.
        upper = builder.shl(builder.zext(arguments[0], wide), ir.Constant(wide, 16))
        return builder.bitcast(upper, ir.FloatType())

    return float32(stored), generate


@compiled
def copy(target, source):
    """Copy a row into another of the same type."""
    for place in range(source.shape[0]):
        target[place] = source[place]


@compiled
def power_of_two(exponent):
    """2^exponent for exponents up to 127, to within 2e-7 of it; 0 below 2^-126.

    numba's own `exp` is a call of the C library for each number unless Intel's vector library is
    installed.
    """
    least = float32(_LEAST)
    clipped = least if exponent < least else exponent  # NaN is not smaller, and stays
    whole = nearest(clipped)
    part = clipped - whole
    power = float32(_C5) + part * float32(_C6)
    power = float32(_C4) + part * power
    power = float32(_C3) + part * power
    power = float32(_C2) + part * power
    power = float32(_C1) + part * power
    power = float32(1.0) + part * power
    # Adding to the exponent's bits, which begin at bit 23, multiplies by a power of two.
    scaled = from_bits(int32(bits_of(power) + int32(int32(whole) << int32(23))))
    return float32(0.0) if clipped == least else scaled
