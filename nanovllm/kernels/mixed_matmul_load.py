"""The loading warps of mixed_matmul.py: one copies weights and their scales, the other activations.

Weights are never written while a step runs, so their warp begins at once, and the first stages are full when the
kernel ahead ends. Activations are that kernel's work: their warp waits for it first.
"""

from __future__ import annotations

from nanovllm.kernels.triton_support import gdc_wait, gl, gluon_jit, mbarrier, tma


@gluon_jit()
def find_unit(
    unit: gl.tensor, num_token_tiles: gl.tensor, NUM_OUTPUT_TILES: gl.constexpr
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """Returns (tile of tokens, tile of outputs, split). Neighbouring programs share a weight, which L2 then holds."""
    rest = unit // num_token_tiles
    return unit % num_token_tiles, rest % NUM_OUTPUT_TILES, rest // NUM_OUTPUT_TILES


@gluon_jit()
def _load_scales(
    desc: tma.tensor_descriptor,
    scales: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    group: gl.tensor,
    row: gl.tensor,
    stage: gl.tensor,
    IS_GATED: gl.constexpr,
) -> None:
    """Starts to copy the scales (or zero points) of the tile that begins at `row`, for a block's groups."""
    GROUPS: gl.constexpr = desc.block_type.shape[0]
    BOX: gl.constexpr = [scales.shape[0] // GROUPS] + desc.block_type.shape  # noqa: RUF005 - Gluon unpacks no lists
    to = scales._reinterpret(scales.dtype, BOX, desc.layout).index(stage)
    if IS_GATED:
        tma.async_copy_global_to_shared(desc, [group, row // 16, 0, 0], ready, to)
    else:
        tma.async_copy_global_to_shared(desc, [group, row], ready, to)


@gluon_jit()
def load_weights(
    weight_desc: tma.tensor_descriptor,
    scale_desc: tma.tensor_descriptor,
    zero_desc: tma.tensor_descriptor,
    num_token_tiles: gl.tensor,
    num_units: gl.tensor,
    weights: gl.shared_memory_descriptor,
    scales: gl.shared_memory_descriptor,
    zeros: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    HAS_ZEROS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    IS_GATED: gl.constexpr,
    BLOCK: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    NUM_OUTPUT_TILES: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    BLOCKS_A_SPLIT: gl.constexpr,
) -> None:
    """Copies the weights of all of the program's units, as far ahead as there are stages."""
    STAGES: gl.constexpr = ready.shape[0]
    BOXES: gl.constexpr = weights.shape[0] // STAGES
    BOX_ROWS: gl.constexpr = weights.shape[1]
    WORDS: gl.constexpr = weights.shape[2]
    ROWS: gl.constexpr = BOXES * BOX_ROWS
    SCALE_BYTES: gl.constexpr = 0 if HAS_SCALE else scales.shape[0] // STAGES * scales.shape[1] * 4
    BYTES: gl.constexpr = ROWS * WORDS * 2 + SCALE_BYTES * (2 if HAS_ZEROS else 1)
    num_loaded = 0
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        _token_tile, output_tile, split = find_unit(unit, num_token_tiles, NUM_OUTPUT_TILES)
        first_row = output_tile * ROWS
        first = split * BLOCKS_A_SPLIT
        for block in range(first, gl.minimum(first + BLOCKS_A_SPLIT, NUM_BLOCKS)):
            stage = num_loaded % STAGES
            mbarrier.wait(free.index(stage), num_loaded // STAGES & 1 ^ 1)
            stage_ready = ready.index(stage)
            mbarrier.expect(stage_ready, BYTES)
            for box in gl.static_range(BOXES):
                to = weights.index(stage * BOXES + box)
                row = first_row + box * BOX_ROWS
                if IS_GATED:
                    to = to._reinterpret(weights.dtype, weight_desc.block_type.shape, weight_desc.layout)
                    tma.async_copy_global_to_shared(weight_desc, [row // 16, 0, 0, block * WORDS], stage_ready, to)
                else:
                    tma.async_copy_global_to_shared(weight_desc, [row, block * WORDS], stage_ready, to)
            if not HAS_SCALE:
                group = block * BLOCK // GROUP_SIZE
                _load_scales(scale_desc, scales, stage_ready, group, first_row, stage, IS_GATED)
                if HAS_ZEROS:
                    _load_scales(zero_desc, zeros, stage_ready, group, first_row, stage, IS_GATED)
            num_loaded += 1


@gluon_jit()
def load_activations(
    x_desc: tma.tensor_descriptor,
    num_token_tiles: gl.tensor,
    num_units: gl.tensor,
    x: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    NUM_OUTPUT_TILES: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    BLOCKS_A_SPLIT: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """Copies the activations. What lies behind the tokens or the inputs becomes 0."""
    STAGES: gl.constexpr = ready.shape[0]
    PARTS: gl.constexpr = x.shape[0] // STAGES
    TOKENS: gl.constexpr = x.shape[1]
    COLUMNS: gl.constexpr = x.shape[2]
    if PDL:
        gdc_wait()
    num_loaded = 0
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        token_tile, _output_tile, split = find_unit(unit, num_token_tiles, NUM_OUTPUT_TILES)
        first = split * BLOCKS_A_SPLIT
        for block in range(first, gl.minimum(first + BLOCKS_A_SPLIT, NUM_BLOCKS)):
            stage = num_loaded % STAGES
            mbarrier.wait(free.index(stage), num_loaded // STAGES & 1 ^ 1)
            mbarrier.expect(ready.index(stage), PARTS * TOKENS * COLUMNS * 2)
            for part in gl.static_range(PARTS):
                at = [token_tile * TOKENS, (block * PARTS + part) * COLUMNS]
                tma.async_copy_global_to_shared(x_desc, at, ready.index(stage), x.index(stage * PARTS + part))
            num_loaded += 1
