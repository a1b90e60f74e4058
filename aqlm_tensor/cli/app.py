"""The command `aqlm-tensor`: quantize, evaluate and run language models, look into checkpoints, explain kernels.

Only options live here; what they do is in the modules beside this one, which load torch. So `--help` is quick.
"""

from pathlib import Path
from typing import Annotated

import typer

from aqlm_tensor.cli.output import failures, settings

__all__ = ["app", "main"]

app = typer.Typer(
    help="AQLM quantization of language models to 1 to 4 bits a weight. Works offline, on local folders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder with a dense, GGUF or AQLM model, or a .gguf file.")
]
GGUFFile = Annotated[str | None, typer.Option(help="Which GGUF file of the folder, if it has several.")]
DenseDtype = Annotated[str, typer.Option(help="Of a dense model: auto (as stored; float32 for GGUF), float32, ...")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


def _version(wanted: bool) -> None:
    if wanted:
        with failures():
            from aqlm_tensor.cli.tables import machine

            machine()
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001 - its callback shows it
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and GPUs, for reports.")
    ] = False,
) -> None:
    settings.debug = debug


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist yet.")],
    scheme: Annotated[
        str, typer.Option(help="KxNgG: K codebooks of N bits for groups of G weights; 2x8g8 is 2 bits a weight.")
    ] = "2x8g8",
    gguf_file: GGUFFile = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="What to calibrate on: a UTF-8 text, a .npy or .pt file of token ids, "
            "dataset:NAME?config=...&split=...&column=..., 'conversations' (a chat model writes questions and "
            "answers), or 'generated' (a model writes its data, chat models some conversations, too); several joined "
            "by '+' give as many windows each. A chat model that sees prose alone forgets how to answer. Without data "
            "the result is poor, most of all on small models."
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Instead of --scheme: bits a weight on average; each layer's scheme follows its sensitivity."
        ),
    ] = None,
    schemes: Annotated[
        str, typer.Option(help="The schemes that --bits chooses from, separated by commas.")
    ] = "1x8g8,2x8g8,3x8g8,4x8g8",
    nsamples: Annotated[int, typer.Option(min=1, help="Windows of the text to use, at most.")] = 128,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the random initialisation.")] = 0,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Tune each block's codebooks, scales and norms against the dense block.")
    ] = False,
    tune: Annotated[
        str | None,
        typer.Option(help="pv: then tune codes, codebooks, scales and norms end to end, against the dense model."),
    ] = None,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", help="With --tune and torchrun: divide both models over the GPUs (FSDP2), if one is too small."
        ),
    ] = False,
    blockwise: Annotated[
        bool,
        typer.Option(help="Calibrate each block on what the quantized ones before it put out, or all on dense inputs."),
    ] = True,
    true_sequential: Annotated[
        bool, typer.Option("--true-sequential", help="Within a block, too: q, k, v; then o; then gate, up; then down.")
    ] = False,
    keep_inputs: Annotated[
        str, typer.Option(help="Where inputs of blocks wait: device, cpu or disk. Saves memory, costs time.")
    ] = "device",
    eval_data: Annotated[
        Path | None,
        typer.Option(help="A text, or token ids, to measure perplexity on, before and after, for the report."),
    ] = None,
    eval_seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window of that text.")] = 2048,
    eval_every: Annotated[int, typer.Option(min=0, help="Measure after every so many blocks, too.")] = 0,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Keep finished layers here, so that the run can be resumed.", show_default="OUT.work"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an earlier run of the same command.")] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the model while it is quantized and of what is stored: auto, float32, ...")
    ] = "auto",
    device: Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize the linear layers of a model's blocks and save a folder that Transformers can load.

    With --data finished layers are kept beside OUT until the end: after Ctrl-C, a crash or a full disk the same command
    with --resume goes on to the same result. OUT holds a report, quantization_report.json, and a plot of it. Started by
    torchrun (torchrun --nproc-per-node 8 --no-python aqlm-tensor quantize ... --device cuda), each GPU has a share of
    the windows and the layers, and the result is the same.
    """
    with failures():
        from aqlm_tensor.cli.quantize import Options, run

        run(
            Options(
                model=model,
                out=out,
                scheme=scheme,
                gguf_file=gguf_file,
                data=data,
                bits=bits,
                schemes=schemes,
                nsamples=nsamples,
                seqlen=seqlen,
                seed=seed,
                finetune=finetune,
                tune=tune,
                shard=shard,
                blockwise=blockwise,
                true_sequential=true_sequential,
                keep_inputs=keep_inputs,
                eval_data=eval_data,
                eval_seqlen=eval_seqlen,
                eval_every=eval_every,
                work_dir=work_dir,
                resume=resume,
                dtype=dtype,
                device=device,
                force=force,
                as_json=as_json,
            )
        )


@app.command()
def estimate(
    model: Model,
    scheme: Annotated[str, typer.Option(help="As for quantize.")] = "2x8g8",
    gguf_file: GGUFFile = None,
    nsamples: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 128,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    finetune: Annotated[bool, typer.Option("--finetune", help="With fine-tuning of each block.")] = False,
    keep_inputs: Annotated[str, typer.Option(help="device, cpu or disk, as for quantize.")] = "device",
    dtype: Annotated[str, typer.Option(help="As for quantize.")] = "auto",
    processes: Annotated[int, typer.Option(min=1, help="Processes (torchrun), each with a GPU of its own.")] = 1,
    as_json: Json = False,
) -> None:
    """Tell how much memory, disk and time quantizing a model block by block will take; reads its config only.

    The time is that of H100s, on one of which it was measured.
    """
    with failures():
        from aqlm_tensor.cli.estimate import run

        run(
            model,
            scheme,
            gguf_file=gguf_file,
            nsamples=nsamples,
            seqlen=seqlen,
            finetune=finetune,
            keep_inputs=keep_inputs,  # pyright: ignore[reportArgumentType] - checked there
            dtype=dtype,
            processes=processes,
            as_json=as_json,
        )


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="What to predict: a UTF-8 text, or a .npy or .pt file of token ids.")],
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    gguf_file: GGUFFile = None,
    dtype: DenseDtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text.

    The text is tokenized once and cut into windows of SEQLEN tokens that do not overlap; each is predicted on its own,
    from its second token on. What is left at the end and fills no window is dropped, as in GPTQ and AQLM (a text
    shorter than one window is one window). The value is exp(mean negative log likelihood) over all predicted tokens.
    """
    with failures():
        from aqlm_tensor.cli.run import evaluate

        evaluate(model, data, seqlen, gguf_file=gguf_file, dtype=dtype, device=device, as_json=as_json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to say to the model.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    gguf_file: GGUFFile = None,
    dtype: DenseDtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Answer a prompt, greedily, through the tokenizer's chat template if it has one."""
    with failures():
        from aqlm_tensor.cli.run import generate

        generate(model, prompt, max_new_tokens, gguf_file=gguf_file, dtype=dtype, device=device, as_json=as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder with an AQLM or a dense model.")],
    as_json: Json = False,
) -> None:
    """List the weights of a checkpoint: scheme, bits a weight, size. Reads file headers only."""
    with failures():
        from aqlm_tensor.cli.tables import inspect

        inspect(path, as_json=as_json)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder that quantize wrote, or its report.")],
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file, .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Show what quantize reported: errors and seconds by layer and block, totals, perplexities."""
    with failures():
        from aqlm_tensor.cli.saved_report import run

        run(path, plot, as_json=as_json)


@app.command()
def kernels(
    scheme: Annotated[str, typer.Option(help="The scheme to ask about.")] = "2x8g8",
    rows: Annotated[str, typer.Option(help="Numbers of tokens multiplied at once, separated by commas.")] = "1,8,512",
    in_features: Annotated[int, typer.Option(min=1, help="Columns of the weight.")] = 4096,
    out_features: Annotated[int, typer.Option(min=1, help="Rows of the weight.")] = 4096,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Device = "cpu",
    explain: Annotated[bool, typer.Option("--explain", help="Say why each other kernel does not run.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="First time the kernels on DEVICE, and store which is fastest when.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell which kernel multiplies with a scheme on this machine.

    What --measure stores, in the folder that AQLM_TENSOR_CACHE names or in ~/.cache/aqlm_tensor, every process of this
    user goes by from then on.
    """
    with failures():
        from aqlm_tensor.cli.tables import kernels

        kernels(
            scheme,
            rows,
            in_features=in_features,
            out_features=out_features,
            dtype=dtype,
            device=device,
            explain=explain,
            measure=measure,
            as_json=as_json,
        )


def main() -> None:
    """Run the command line."""
    app()
