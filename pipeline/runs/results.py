"""What metrics.json holds, in words, for the command line and the card."""


def format_proportion(found: dict) -> str:
    """A share with its interval, in words."""
    return f"{found['share']:.1%} ({found['interval'][0]:.0%} to {found['interval'][1]:.0%} of {found['n']})"


def format_mean(found: dict, digits: int = 2) -> str:
    """A mean with its interval, in words."""
    low, high = found["interval"]
    return f"{found['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def format_distances(found: dict) -> list[str]:
    """Distances by feature network, a line each."""
    lines = []
    for name, by in found.items():
        lines += [f"  kid ({name}) {by['kid']['value']:.4f} ± {by['kid']['error']:.4f}"]
        if frechet := by.get("frechet"):
            lines[-1] += (
                f"; Fréchet distance ({name}) {frechet['value']:.1f}, of real pictures {frechet['real']:.1f}, "
                f"both {frechet['n']} against {frechet['n']}"
            )
    return lines


def format_extra_metrics(found: dict) -> list[str]:
    """Errors, bits and diversity, a line each."""
    lines, errors = [], found["errors"]
    for kind in ("x_0", "eps"):
        splits = [split for split in ("train", "held_out") if split in errors]
        each = [
            f"t = {t} " + " and ".join(f"{errors[split][kind][i]:.4f}" for split in splits)
            for i, t in enumerate(errors["timesteps"])
        ]
        lines += [
            f"mean squared error of {kind} ({' and '.join(splits).replace('_', '-')} pictures): {', '.join(each)}"
        ]
    if bits := found.get("bits_per_dimension"):
        lines += [
            f"held-out pictures: at most {format_mean(bits['model'])} bits per dimension by the bound; as PNG "
            f"{format_mean(bits['png'])}, as lossless WebP {format_mean(bits['webp'])}"
        ]
    each = [f"w = {w} {format_mean(by_w)}" for w, by_w in found["diversity"].items()]
    taken = f" in {found['num_inference_steps']} steps" if "num_inference_steps" in found else ""
    return [*lines, f"diversity, the judge's distance between seeds{taken}: {', '.join(each)}"]


def format_sweep(found: dict) -> list[str]:
    """The table of a sweep, a line a point."""
    base = ", ".join(f"{name} = {value}" for name, value in found["base"]["at"].items())
    point = lambda at, by: (
        f"  {at}: kid ({found['features']}) {by['kid']['value']:.4f} ± {by['kid']['error']:.4f}, first "
        f"{format_proportion(by['first'])}, first five {format_proportion(by['first_five'])}, {by['calls']} calls"
    )
    lines = [
        f"sweep over {found['captions']} captions, seed {found['seed']}:",
        point(base, found["base"]),
    ]
    return lines + [
        point(f"{knob} = {by['at']}", by)
        for knob, points in found["curves"].items()
        for by in points
    ]


def format_seeds(result: dict) -> list[str]:
    """What every caption's drawings were worth."""
    refs, lines = (
        result["references"],
        [f"w = {result['w']:g}, {result['num_inference_steps']} steps"],
    )
    for seed, found in result["by_seed"].items():
        lines += [
            f"seed {seed}: training captions: first {format_proportion(found['train']['first'])}, "
            f"first five {format_proportion(found['train']['first_five'])}; seams {found['seam_ratio']:.2f} of real"
        ]
        if "held_out" in found:
            lines += [
                f"  held-out combinations: first {format_proportion(found['held_out']['first'])}, "
                f"copies {format_proportion(found['held_out']['copies'])}"
            ]
            lines += [
                f"    {name}: first {format_proportion(grid['first'])}"
                for name, grid in found["grids"].items()
            ]
        lines += format_distances(found.get("distances", {}))
        if clip := found.get("clip"):
            lines += [
                f"  CLIP score ({clip['model']}) {format_mean(clip['drawn'])}, of real pictures {format_mean(clip['real'])}"
            ]
        lines += [f"  free prompts: copies {format_proportion(result['free_prompt_copies'][seed])}"]
    lines += [
        f"chance: first {refs['chance']['first']:.2%}, first five {refs['chance']['first_five']:.2%}; "
        f"a lightly augmented real picture: first {format_proportion(refs['ceiling']['first'])}, first five "
        f"{format_proportion(refs['ceiling']['first_five'])}"
    ]
    if sibling := refs.get("siblings", {}).get("held_out"):
        lines += [
            f"a sibling's picture: first {format_proportion(sibling['first'])}, first five {format_proportion(sibling['first_five'])}; "
            f"real held-out pictures: copies {format_proportion(refs['real_held_out_copies'])}"
        ]
    return lines


def format_results(result: dict) -> str:
    """The headline of what metrics.json holds, a few lines."""
    lines = format_seeds(result) if "by_seed" in result else []
    lines += format_extra_metrics(result["more"]) if "more" in result else []
    return "\n".join(lines + (format_sweep(result["sweep"]) if "sweep" in result else []))
