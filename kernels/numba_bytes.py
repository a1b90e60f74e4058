"""Vectors of 64 bytes for Numba functions: lookups in tables that stay in registers, and the way to fixed point.

AVX-512 VBMI permutes the bytes of two registers by 64 indices in one instruction. `add_permuted` may only be compiled
where `can_permute` says so. As in numba_vectors, addresses are integers in bytes and nothing checks bounds.
"""

import functools
from typing import Any

from llvmlite import binding, ir
from numba import config
from numba.core import cgutils, types
from numba.extending import models, register_model

from aqlm_tensor.kernels.numba_vectors import fma_of, intrinsic, pointer_to, splat_of

__all__ = [
    "VECTOR_BYTES",
    "absolute_each",
    "add_permuted",
    "add_words",
    "can_permute",
    "greater_magnitude",
    "greatest_lane",
    "least_lane",
    "lesser",
    "split_bytes",
    "zero_words",
]

VECTOR_BYTES = 64  # bytes of a vector
_BYTE, _WORD, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _WORDS, _INTS = (
    ir.VectorType(_BYTE, VECTOR_BYTES),
    ir.VectorType(_WORD, VECTOR_BYTES // 2),
    ir.VectorType(_INT, VECTOR_BYTES // 2),
)
_TABLE = 256  # bytes


@functools.cache
def can_permute() -> bool:
    """Whether this processor has the instructions and Numba compiles for it."""
    settings: Any = config  # attributes that it sets from the environment
    if settings.CPU_NAME or settings.CPU_FEATURES:
        return False
    features = binding.get_host_cpu_features()
    return all(features.get(name) for name in ("avx512f", "avx512bw", "avx512vbmi"))


class _WordsType(types.Type):
    """Numba type of 32 sums of 16 bits."""

    def __init__(self) -> None:
        super().__init__(name="Int16x32")


@register_model(_WordsType)
class _WordsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: _WordsType) -> None:
        super().__init__(dmm, fe_type, _WORDS)


_words = _WordsType()


def _constant(vector: Any, value: int) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _at(builder: Any, address: Any, offset: int, pointee: Any) -> Any:
    return pointer_to(builder, builder.add(address, ir.Constant(_LONG, offset)), pointee)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))


@intrinsic
def split_bytes(typingctx, floats, scale, planes):  # noqa: ANN001, ANN201, ARG001
    """Write 64 floats times `scale`, rounded to int32 with the sign bit inverted, as four planes of 64 bytes.

    `floats` and `planes` are addresses. Planes are 256 bytes apart, lowest bits first.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        lanes = ir.VectorType(ir.FloatType(), 16)
        ints = ir.VectorType(_INT, 16)
        rounding = ir.FunctionType(ints, [lanes])
        function = cgutils.get_or_insert_function(builder.module, rounding, "llvm.lrint.v16i32.v16f32")
        parts = []
        for i in range(4):
            values = builder.load(_at(builder, args[0], 64 * i, lanes), align=4)
            rounded = builder.call(function, [builder.fmul(values, splat_of(builder, args[1], lanes))])
            parts.append(builder.bitcast(builder.xor(rounded, _constant(ints, -(1 << 31))), _BYTES))
        low, high = list(range(32)), list(range(32, 64))
        for plane in (0, 2):  # two at a time: bytes of the even and of the odd one, first of 32 floats, then of 64
            pick = [4 * lane + plane for lane in range(32)] + [4 * lane + plane + 1 for lane in range(32)]
            first, second = (_shuffle(builder, parts[i], parts[i + 1], pick) for i in (0, 2))
            for i, half in enumerate((low, high)):
                both = _shuffle(builder, first, second, half + [lane + 64 for lane in half])
                builder.store(both, _at(builder, args[2], _TABLE * (plane + i), _BYTES), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen


@intrinsic(prefer_literal=True)
def zero_words(typingctx, vectors):  # noqa: ANN001, ANN201, ARG001
    """Zero sums of two planes for `vectors` (a constant) times 64 rows, as `add_permuted` takes them."""
    sums = types.UniTuple(_words, 4 * vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return context.make_tuple(builder, sums, [_constant(_WORDS, 0)] * sums.count)

    return sums(vectors), codegen


@intrinsic
def add_permuted(typingctx, sums, codes, tables):  # noqa: ANN001, ANN201, ARG001
    """Add to sums the bytes that 64 rows' codes choose from two tables of 256 bytes, one table after the other.

    For each vector of 64 rows and each table there are two vectors of 16-bit sums: of the words that the bytes of rows
    2 i and 2 i + 1 form, modulo 2^16, and of the bytes of rows 2 i + 1.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        totals = list(cgutils.unpack_tuple(builder, args[0]))
        permute = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_BYTES, [_BYTES] * 3), "llvm.x86.avx512.vpermi2var.qi.512"
        )
        tables = [builder.load(_at(builder, args[2], 64 * i, _BYTES), align=1) for i in range(8)]
        for vector in range(len(totals) // 4):
            indices = builder.load(_at(builder, args[1], VECTOR_BYTES * vector, _BYTES), align=1)
            upper = builder.icmp_signed("<", indices, _constant(_BYTES, 0))
            for plane in range(2):
                a, b, c, d = tables[4 * plane : 4 * plane + 4]
                halves = (builder.call(permute, (c, indices, d)), builder.call(permute, (a, indices, b)))
                pairs = builder.bitcast(builder.select(upper, *halves), _WORDS)
                i = 4 * vector + 2 * plane
                totals[i] = builder.add(totals[i], pairs)
                totals[i + 1] = builder.add(totals[i + 1], builder.lshr(pairs, _constant(_WORDS, 8)))
        return context.make_tuple(builder, sums, totals)

    return sums(sums, types.int64, types.int64), codegen


def _low_bytes(builder: Any, pairs: Any, high: Any) -> Any:
    return builder.sub(pairs, builder.shl(high, _constant(_WORDS, 8)))


def _row_floats(builder: Any, words: list[Any], excess: Any) -> Any:
    """The sums of 64 rows as floats from a vector's four of `add_permuted`: first plane + 256 * (second - excess)."""
    half = ir.VectorType(ir.FloatType(), VECTOR_BYTES // 2)
    first = (_low_bytes(builder, words[0], words[1]), words[1])
    second = (_low_bytes(builder, words[2], words[3]), words[3])
    floats = []  # of the rows 2 i, and of the rows 2 i + 1
    for low, high in zip(first, second, strict=True):
        wide = builder.shl(builder.sext(builder.sub(high, excess), _INTS), _constant(_INTS, 8))
        floats.append(builder.sitofp(builder.add(wide, builder.sext(low, _INTS)), half))
    in_order = [lane for i in range(VECTOR_BYTES // 2) for lane in (i, i + VECTOR_BYTES // 2)]
    return _shuffle(builder, floats[0], floats[1], in_order)


@intrinsic
def add_words(typingctx, address, sums, excess, scale):  # noqa: ANN001, ANN201, ARG001
    """Add scale * (first plane + 256 * (second plane - excess)) to the float32 sums of rows at an address.

    `sums` are what `add_permuted` returned, of at most 128 bytes each; 64 rows of floats lie at the address for each
    vector of rows.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        words, full = cgutils.unpack_tuple(builder, args[1]), ir.VectorType(ir.FloatType(), VECTOR_BYTES)
        excess = splat_of(builder, builder.trunc(args[2], _WORD), _WORDS)
        scale = splat_of(builder, args[3], full)
        for vector in range(len(words) // 4):
            floats = _row_floats(builder, words[4 * vector : 4 * vector + 4], excess)
            place = _at(builder, args[0], 4 * VECTOR_BYTES * vector, full)
            builder.store(fma_of(builder, floats, scale, builder.load(place, align=4)), place, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, sums, types.int64, types.float32), codegen


@intrinsic
def absolute_each(typingctx, vectors):  # noqa: ANN001, ANN201, ARG001
    """The tuple of the vectors of a tuple without signs."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        vector = context.get_value_type(vectors.dtype)
        kind = ir.FunctionType(vector, [vector])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fabs.v{vector.count}f32")
        magnitudes = [builder.call(function, [value]) for value in cgutils.unpack_tuple(builder, args[0])]
        return context.make_tuple(builder, vectors, magnitudes)

    return vectors(vectors), codegen


@intrinsic
def lesser(typingctx, a, b):  # noqa: ANN001, ANN201, ARG001
    """The lesser of a and b, lane by lane; b where either is NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return a(a, b), codegen


@intrinsic
def greater_magnitude(typingctx, a, b):  # noqa: ANN001, ANN201, ARG001
    """The greater of a and |b| for a without sign, lane by lane; NaN is greater than infinity."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        bits = ir.VectorType(_INT, a.lanes)
        without_sign = ir.Constant(bits, [0x7FFFFFFF] * a.lanes)
        first, second = builder.bitcast(args[0], bits), builder.and_(builder.bitcast(args[1], bits), without_sign)
        larger = builder.select(builder.icmp_signed(">", first, second), first, second)
        return builder.bitcast(larger, args[0].type)

    return a(a, b), codegen


def _fold(builder: Any, value: Any, combine: Any) -> Any:
    """The one lane that is left of a vector whose halves are combined again and again."""
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        low = _shuffle(builder, value, value, list(range(lanes)))
        value = combine(low, _shuffle(builder, value, value, list(range(lanes, 2 * lanes))))
    return builder.extract_element(value, ir.Constant(_INT, 0))


@intrinsic
def least_lane(typingctx, vector):  # noqa: ANN001, ANN201, ARG001
    """The least of a vector's lanes (a power of two of them), none of them NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return _fold(builder, args[0], lambda a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))

    return types.float32(vector), codegen


@intrinsic
def greatest_lane(typingctx, vector):  # noqa: ANN001, ANN201, ARG001
    """The greatest of a vector's lanes (a power of two of them), none negative; NaN is greater than infinity."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        bits = builder.bitcast(args[0], ir.VectorType(_INT, vector.lanes))
        greatest = _fold(builder, bits, lambda a, b: builder.select(builder.icmp_signed(">", a, b), a, b))
        return builder.bitcast(greatest, ir.FloatType())

    return types.float32(vector), codegen
