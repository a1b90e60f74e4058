"""Vectors of float32 and raw loads for Numba functions, lowered to single LLVM instructions.

Numba leaves vectorising to LLVM, whose vectorisers turn table lookups into gathers that are two to four times slower
than plain loads. The kernels therefore say which vectors they want. A vector is a value of type `VectorType(lanes)`
inside compiled code only; addresses are integers in bytes. Everything here is inlined; nothing checks bounds.
"""

from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.extending import models, register_model

__all__ = [
    "VectorType",
    "add",
    "address_of",
    "eight_of",
    "fetch_add",
    "float_at",
    "fma",
    "fma_of",
    "inner_fma",
    "intrinsic",
    "lanes_of",
    "load",
    "load_bfloat16",
    "load_bits",
    "load_each",
    "load_float16",
    "multiply",
    "pointer_to",
    "prefetch",
    "splat",
    "splat_each",
    "splat_of",
    "store",
    "store_each",
    "store_float",
    "sum_lanes",
    "tile_fma",
    "zero_tuple",
    "zeros",
]

# Any: calls leave out the typing context that the decorated function takes first, which no type checker follows
intrinsic: Any = extending.intrinsic


class VectorType(types.Type):
    """Numba type of `lanes` float32 values in a register (or several)."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Float32x{lanes}")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: VectorType) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(ir.FloatType(), fe_type.lanes))


def pointer_to(builder: Any, address: Any, pointee: Any) -> Any:
    """For the bodies of intrinsics: an address as a pointer to an IR type."""
    return builder.inttoptr(address, pointee.as_pointer())


def splat_of(builder: Any, value: Any, vector: Any) -> Any:
    """For the bodies of intrinsics: the vector of an IR type with the same value in each lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    single = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(single, undefined, _lane_mask([0] * vector.count))


def fma_of(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """For the bodies of intrinsics: a * b + c of float32 vectors, rounded once."""
    signature = ir.FunctionType(a.type, [a.type] * 3)  # llvmlite's own builder.fma takes no vectors
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.v{a.type.count}f32")
    return builder.call(function, (a, b, c))


def _lane_mask(lanes: range | list[int]) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))


@intrinsic
def address_of(typingctx, pointer):  # noqa: ANN001, ANN201, ARG001 - Numba reads these names
    """The address that a C pointer holds."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(pointer), codegen


@intrinsic
def float_at(typingctx, address):  # noqa: ANN001, ANN201, ARG001
    """The float32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.load(pointer_to(builder, args[0], ir.FloatType()), align=4)

    return types.float32(types.int64), codegen


@intrinsic
def load(typingctx, address, like):  # noqa: ANN001, ANN201, ARG001
    """The vector at an address, of the type of the vector `like`; no alignment beyond 4 bytes is assumed."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.load(pointer_to(builder, args[0], context.get_value_type(like)), align=4)

    return like(types.int64, like), codegen


@intrinsic
def load_bfloat16(typingctx, address, like):  # noqa: ANN001, ANN201, ARG001
    """The bfloat16 values at an address, widened to a vector of the type of `like`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        bits = builder.load(pointer_to(builder, args[0], ir.VectorType(ir.IntType(16), like.lanes)), align=2)
        words = builder.zext(bits, ir.VectorType(ir.IntType(32), like.lanes))
        shift = ir.Constant(words.type, [16] * like.lanes)
        return builder.bitcast(builder.shl(words, shift), context.get_value_type(like))

    return like(types.int64, like), codegen


@intrinsic
def load_float16(typingctx, address, like):  # noqa: ANN001, ANN201, ARG001
    """The float16 values at an address, widened to a vector of the type of `like`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        halves = builder.load(pointer_to(builder, args[0], ir.VectorType(ir.HalfType(), like.lanes)), align=2)
        return builder.fpext(halves, context.get_value_type(like))

    return like(types.int64, like), codegen


@intrinsic
def lanes_of(typingctx, vector):  # noqa: ANN001, ANN201, ARG001
    """The number of lanes of a vector, a constant."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return ir.Constant(ir.IntType(64), vector.lanes)

    return types.int64(vector), codegen


@intrinsic
def store(typingctx, address, vector):  # noqa: ANN001, ANN201, ARG001
    """Write a vector to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        builder.store(args[1], pointer_to(builder, args[0], context.get_value_type(vector)), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector), codegen


@intrinsic
def store_float(typingctx, address, value):  # noqa: ANN001, ANN201, ARG001
    """Write a float32 to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        builder.store(args[1], pointer_to(builder, args[0], ir.FloatType()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic(prefer_literal=True)
def load_bits(typingctx, address, bits):  # noqa: ANN001, ANN201, ARG001
    """The unsigned integer of 8, 16 or 32 `bits` (a constant) at an address, as int64.

    The load is volatile: LLVM's loop vectoriser leaves a loop with such a load alone, which is the point.
    """
    stored = ir.IntType(bits.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        value = builder.load(pointer_to(builder, args[0], stored), align=1)
        value.volatile = True
        return builder.zext(value, ir.IntType(64))

    return types.int64(types.int64, bits), codegen


@intrinsic
def splat(typingctx, value, like):  # noqa: ANN001, ANN201, ARG001
    """The vector of the type of `like` with the same float32 in each lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return splat_of(builder, args[0], context.get_value_type(like))

    return like(types.float32, like), codegen


@intrinsic(prefer_literal=True)
def zeros(typingctx, lanes):  # noqa: ANN001, ANN201, ARG001
    """The zero vector of `lanes` (a constant) floats."""
    vector = VectorType(lanes.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return ir.Constant(context.get_value_type(vector), None)

    return vector(lanes), codegen


@intrinsic
def add(typingctx, a, b):  # noqa: ANN001, ANN201, ARG001
    """a + b, lane by lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.fadd(*args)

    return a(a, b), codegen


@intrinsic
def multiply(typingctx, a, b):  # noqa: ANN001, ANN201, ARG001
    """a * b, lane by lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.fmul(*args)

    return a(a, b), codegen


@intrinsic
def fma(typingctx, a, b, c):  # noqa: ANN001, ANN201, ARG001
    """a * b + c, lane by lane, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return fma_of(builder, *args)

    return a(a, b, c), codegen


@intrinsic
def sum_lanes(typingctx, vector):  # noqa: ANN001, ANN201, ARG001
    """The sum of a vector's lanes (a power of two), by halves: always the same order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        total, lanes = args[0], vector.lanes
        while lanes > 1:
            lanes //= 2
            low = builder.shuffle_vector(total, total, _lane_mask(range(lanes)))
            high = builder.shuffle_vector(total, total, _lane_mask(range(lanes, 2 * lanes)))
            total = builder.fadd(low, high)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(vector), codegen


@intrinsic(prefer_literal=True)
def zero_tuple(typingctx, count, lanes):  # noqa: ANN001, ANN201, ARG001
    """A tuple of `count` zero vectors of `lanes` floats (both constants)."""
    vectors = types.UniTuple(VectorType(lanes.literal_value), count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        zero = ir.Constant(context.get_value_type(vectors.dtype), None)
        return context.make_tuple(builder, vectors, [zero] * vectors.count)

    return vectors(count, lanes), codegen


def _strided(builder: Any, address: Any, stride: Any, count: int) -> list[Any]:
    return [builder.add(address, builder.mul(stride, ir.Constant(ir.IntType(64), i))) for i in range(count)]


@intrinsic
def eight_of(typingctx, vector):  # noqa: ANN001, ANN201, ARG001
    """A tuple of eight zero vectors of the type of `vector`."""
    vectors = types.UniTuple(vector, 8)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        zero = ir.Constant(context.get_value_type(vector), None)
        return context.make_tuple(builder, vectors, [zero] * 8)

    return vectors(vector), codegen


@intrinsic
def load_each(typingctx, address, stride, like):  # noqa: ANN001, ANN201, ARG001
    """The tuple, of the type of `like`, of vectors that lie `stride` bytes apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        vector = context.get_value_type(like.dtype)
        places = _strided(builder, args[0], args[1], like.count)
        loaded = [builder.load(pointer_to(builder, place, vector), align=4) for place in places]
        return context.make_tuple(builder, like, loaded)

    return like(types.int64, types.int64, like), codegen


@intrinsic
def splat_each(typingctx, address, stride, like):  # noqa: ANN001, ANN201, ARG001
    """The tuple, of the type of `like`, of vectors each filled with one of the floats that lie `stride` bytes apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        vector = context.get_value_type(like.dtype)
        places = _strided(builder, args[0], args[1], like.count)
        floats = [builder.load(pointer_to(builder, place, ir.FloatType()), align=4) for place in places]
        return context.make_tuple(builder, like, [splat_of(builder, value, vector) for value in floats])

    return like(types.int64, types.int64, like), codegen


@intrinsic
def store_each(typingctx, address, stride, vectors):  # noqa: ANN001, ANN201, ARG001
    """Write the vectors of a tuple `stride` bytes apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        vector = context.get_value_type(vectors.dtype)
        places = _strided(builder, args[0], args[1], vectors.count)
        for place, value in zip(places, cgutils.unpack_tuple(builder, args[2]), strict=True):
            builder.store(value, pointer_to(builder, place, vector), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vectors), codegen


@intrinsic
def inner_fma(typingctx, total, a, b):  # noqa: ANN001, ANN201, ARG001
    """total + a[0] * b[0] + a[1] * b[1] + ... for tuples of vectors, in that order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        result = args[0]
        lefts, rights = (cgutils.unpack_tuple(builder, arg) for arg in args[1:])
        for left, right in zip(lefts, rights, strict=True):
            result = fma_of(builder, left, right, result)
        return result

    return total(total, a, b), codegen


@intrinsic
def tile_fma(typingctx, tile, a, b):  # noqa: ANN001, ANN201, ARG001
    """tile[i * len(b) + j] + a[i] * b[j] for all i, j: one step of a register-blocked product (tuples of vectors)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        sums, lefts, rights = (cgutils.unpack_tuple(builder, arg) for arg in args)
        pairs = [(left, right) for left in lefts for right in rights]
        updated = [fma_of(builder, left, right, total) for (left, right), total in zip(pairs, sums, strict=True)]
        return context.make_tuple(builder, tile, updated)

    return tile(tile, a, b), codegen


@intrinsic
def fetch_add(typingctx, address):  # noqa: ANN001, ANN201, ARG001
    """Add 1 to the int64 at an address, atomically (acquire and release), and return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        pointer = pointer_to(builder, args[0], ir.IntType(64))
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(types.int64), codegen


@intrinsic
def prefetch(typingctx, address):  # noqa: ANN001, ANN201, ARG001
    """Ask for the cache line at an address, which may be beyond any memory of ours."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        line = pointer_to(builder, args[0], ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [line.type, *[ir.IntType(32)] * 3])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(
            function, (line, *(ir.Constant(ir.IntType(32), value) for value in (0, 3, 1)))
        )  # read, all levels, data
        return context.get_dummy_value()

    return types.void(types.int64), codegen
