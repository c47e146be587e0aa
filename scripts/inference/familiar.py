"""Does this model know such scans? A verdict on a scan, and where it is no, the reason and what mends it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.networks.utils import eval_mode
from monai.transforms import Compose, Orientation
from monai.utils import ensure_tuple
from scripts.data.transforms import reading
from scripts.inference.explanations import Hypotheses, Hypothesis, connected_brain
from scripts.inference.training_run import INFERENCE
from scripts.networks import VDVAE
from scripts.population.familiarity import LEAST_ALIKE, Familiarity, Look, look, reference
from scripts.population.files import FIT_IT
from scripts.population.prior import PopulationPrior
from scripts.utils.errors import InputError, root_cause
from scripts.utils.files import expand
from scripts.utils.formats import SPACE_CODE, save_nifti
from torch import Tensor
from tqdm import tqdm

MEND = "`python -m scripts.prepare --like WEIGHTS` mends it"
REMEDIES = {
    **dict.fromkeys(("orientation", "alignment", "voxel_size", "skull"), MEND),
    "contrast": "weights of this contrast are needed",
    "range": "export it again, without clipping, or leave out what outshines the brain",
    "crop": "the job impute fills in what a mask marks",
    "resolution": "weights of such slices are needed",
}
MENDED = {reason for reason, remedy in REMEDIES.items() if remedy == MEND}
ROUNDS = 3  # of what may have happened to one scan, one after the other
NEARER = 0.8  # of the distance from what is usual: what explains a scan leaves less
MUCH_NEARER = 0.5  # what leaves more, and not a familiar scan, explains less than that the scan is blurred, if it is
ALIKE = 1.1  # the simplest hypothesis that leaves up to this times the least distance, or a usual one, is taken
ANOTHER_SCANNER = 4.0  # times the limit, up to which a scan of the right kind may be of another scanner
FARTHER = 0.5  # the share of people who lie farther than what is a usual distance in this


class Step(NamedTuple):
    """Something that happened to a scan: a word, half a sentence, by how many bits per dim the scan is nearer to usual
    ones without it, and the movement of the world that undoes it, or what was before.
    """

    reason: str
    words: str
    gain: float
    transform: np.ndarray


class Finding(NamedTuple):
    """What is found of a scan.

    Attributes:
        familiar: whether the cohort has such scans.
        distance: from what is usual, in standard deviations of the cohort, and ``limit``, which familiar ones keep.
        bits_per_dim: at the means of the posteriors.
        steps: what explains it, in the order in which it was found.
        gains: of the best hypothesis for each reason alone.
        seen, undone: an unfamiliar scan as the network got it, and mended, ``[channels, *spatial]``; None where nothing
            mends it.
        statistics: what is compared, ``[numbers]``.
        scanner: whether it may be of another scanner: it is less likely than usual all over the brain, not in places
            and not by much, and nothing explains it but perhaps its contrast.
        alike: how many scans of which this may be so or that nothing explains, this one among them, are unlike the
            cohort in the same way.
    """

    familiar: bool
    distance: float
    limit: float
    bits_per_dim: float
    steps: tuple[Step, ...] = ()
    gains: Mapping[str, float] = {}
    seen: Tensor | None = None
    undone: Tensor | None = None
    statistics: Tensor | None = None
    scanner: bool = False
    alike: int = 0

    @property
    def reason(self) -> str:
        """The word for what was found first; ``unknown`` where nothing explains it; empty for a familiar scan."""
        if self.familiar:
            return ""
        return self.steps[0].reason if self.steps else "unknown"

    @property
    def gain(self) -> float | None:
        """Bits per dim that the reason explains; None without one."""
        return self.steps[0].gain if self.steps else None

    def sentence(self) -> str:
        """Half a sentence for people."""
        said = (
            f"the network does not know such scans: it is {self.distance:.1f} from what is usual in training, and "
            f"{self.limit:.1f} is the limit"
        )
        found = "; then ".join(
            step.words + (f" ({step.gain:.2g} bits per dim better)" if step.gain > 0 else "") for step in self.steps
        )
        found = found or "no fault that is known explains it"
        learnt = "which the job adapt learns from some of its scans"
        if self.alike:
            alike = f"{self.alike} of these scans are unlike those in the same way"
            return f"{said}; {found}; {alike}, so that it may be their scanner or protocol, {learnt}"
        if self.scanner:
            return f"{said}; {found}; that is so all over the brain: it may be of another scanner or protocol, {learnt}"
        if not self.steps:
            return f"{said}; {found}, so that it may be the scanner, age or disease"
        remedies = dict.fromkeys(REMEDIES[step.reason] for step in self.steps)
        return f"{said}: {found}; {', '.join(remedies)}"


class Examiner:
    """Says of scans whether a network knows such ones.

    Args:
        network: trained.
        prior: its population prior, which says what is usual.
        preprocessing: of scans, from their files on.
        batch_size: scans that the network sees at a time.

    Raises:
        InputError: it does not.
    """

    def __init__(
        self, network: VDVAE, prior: PopulationPrior | None, preprocessing: Compose, batch_size: int = 4
    ) -> None:
        self.network, self.prior, self.batch_size = network, prior, batch_size
        known = Familiarity.of(prior)
        if known is None:
            of = (
                "There is no population prior, which"
                if prior is None
                else f"The population prior '{prior.path}' does not"
            )
            raise InputError(f"{of} {'would say' if prior is None else 'say'} which scans are usual: {FIT_IT}.")
        self.familiarity, self.limit = known, known.limit()
        self.read = reading(preprocessing)
        self.fit, *others, self.scale = preprocessing.transforms[len(self.read) :]
        if others:
            names = ", ".join(type(other).__name__ for other in others)
            raise InputError(
                f"preprocessing has {names} between fit and scale: what happened to scans is not sought then."
            )

    @classmethod
    def of(
        cls,
        ckpt: str | os.PathLike | None = None,
        config_file: str | Sequence[str] = (),
        run_dir: str | os.PathLike | None = None,
    ) -> Examiner:
        """That of some weights, with the population prior beside them.

        Args:
            ckpt: the weights; None: those of the run.
            config_file: overlays of configs/inference.json, one or a list, where the weights need them.
            run_dir: folder of a run, whose network and preprocessing are taken.
        """
        config = ConfigParser()
        config.read_config([str(INFERENCE), *ensure_tuple(config_file)])
        config["bundle_root"] = str(INFERENCE.parents[1])
        config.update({name: expand(path) for name, path in (("ckpt", ckpt), ("run_dir", run_dir)) if path is not None})
        return cls(*(config.get_parsed_content(name) for name in ("network", "population_prior", "preprocessing")))

    @property
    def mean_scan(self) -> Tensor:
        """The cohort's mean scan, ``[channels, *spatial]``."""
        return reference(self.network)[0][0]

    def look(self, scans: Tensor) -> tuple[Tensor, Tensor]:
        """Bits per dim of scans, and how far they are from what is usual, ``[batch]`` each."""
        seen = self._seen(scans)
        return seen.bits_per_dim, self.familiarity.distance(seen.statistics)

    @torch.no_grad()
    def _seen(self, scans: Tensor) -> Look:
        """Scans as the network sees them, on the host, double precision."""
        device = next(self.network.parameters()).device
        with eval_mode(self.network):
            looks = [look(self.network, part.to(device), self.prior) for part in scans.split(self.batch_size)]
        return Look(*(torch.cat(values).cpu().double() for values in zip(*looks, strict=True)))

    def load(self, files: str | Sequence[str]) -> MetaTensor:
        """A scan from its file, or from one for each channel, ``[channels, *spatial]``, upright."""
        files = ensure_tuple(files)
        return self.read({"image": files[0] if len(files) == 1 else list(files)})["image"]

    def examine(self, image: MetaTensor) -> Finding:
        """What is found of a scan, ``[channels, *spatial]``, upright."""
        scan = self.scale(self.fit({"image": image}))["image"].as_tensor()
        seen = self._seen(scan[None])
        bits, distance = float(seen.bits_per_dim), float(self.familiarity.distance(seen.statistics))
        found = Finding(distance <= self.limit, distance, self.limit, bits, statistics=seen.statistics[0])
        if found.familiar:
            return found
        found = self._explained(image, found._replace(seen=scan))
        right = {step.reason for step in found.steps} <= {"contrast"} and distance <= ANOTHER_SCANNER * self.limit
        return found._replace(scanner=right and bool(self.familiarity.everywhere(seen.surprise)))

    def compared(self, findings: Sequence[Finding]) -> list[Finding]:
        """What is found of scans that are seen side by side: whether those that may be of another scanner are alike."""
        unknown = [place for place, found in enumerate(findings) if found.scanner or found.reason == "unknown"]
        result = list(findings)
        if len(unknown) >= LEAST_ALIKE:
            alike = self.familiarity.alike(torch.stack([findings[place].statistics for place in unknown]))
            if alike.sum() >= LEAST_ALIKE:
                for place in itertools.compress(unknown, alike.tolist()):
                    result[place] = result[place]._replace(alike=int(alike.sum()))
        return result

    def _explained(self, image: MetaTensor, found: Finding) -> Finding:
        usual = self.familiarity.limit(FARTHER)
        hypotheses = Hypotheses(self.network, self.familiarity, image, self.fit.fit, self.scale)
        known, distance, bits = Hypothesis(np.eye(image.ndim)), found.distance, found.bits_per_dim
        steps: list[Step] = []
        gains: dict[str, float] = {}
        for _ in range(ROUNDS):
            candidates = list(hypotheses.after(known, [step.reason for step in steps]))
            seen, far = self.look(torch.stack([hypotheses.scan(candidate) for candidate in candidates]))
            gained = abs(bits - self.familiarity.bits_per_dim) - (seen - self.familiarity.bits_per_dim).abs()
            if not steps:
                for candidate, gain in zip(candidates, gained.tolist(), strict=True):
                    gains[candidate.reason] = max(gain, gains.get(candidate.reason, gain))
            place = int((far <= max(usual, ALIKE * far.min())).nonzero()[0])
            blurred = (
                self._blurred(hypotheses, known, bits) if far[place] > max(self.limit, MUCH_NEARER * distance) else []
            )
            if blurred or far[place] > NEARER * distance:
                steps += blurred
                break
            known, distance, bits = candidates[place], float(far[place]), float(seen[place])
            steps.append(Step(known.reason, known.words, float(gained[place]), known.transform))
            if distance <= self.limit:
                break
        return found._replace(steps=tuple(steps), gains=gains, undone=hypotheses.scan(known) if steps else None)

    def _blurred(self, hypotheses: Hypotheses, known: Hypothesis, bits: float) -> list[Step]:
        """Where nothing brings a scan much nearer: a blur that one can see, but not undo."""
        blurred = hypotheses.blurred(known)
        if blurred is None:
            return []
        (seen,), _ = self.look(hypotheses.scan(blurred)[None])
        gain = abs(bits - self.familiarity.bits_per_dim) - abs(float(seen) - self.familiarity.bits_per_dim)
        return [Step(blurred.reason, blurred.words, gain, blurred.transform)]


def mended_scan(image: MetaTensor, found: Finding) -> MetaTensor | None:
    """A scan that was examined, without what can be undone and leaves its values: where it lies, and what is no brain,
    which becomes as dark as the scan's darkest voxel; None where nothing of that was found.
    """
    reasons = {step.reason for step in found.steps}
    if not reasons & MENDED:
        return None
    mended = image.clone()
    if "skull" in reasons:
        outside = ~torch.from_numpy(connected_brain(image))
        for channel in mended:
            channel[outside] = channel.min()
    mended.affine = torch.from_numpy(np.linalg.inv(found.steps[-1].transform)) @ image.affine.to(torch.float64)
    return Orientation("RAS", labels=None)(mended)


def mend_scans(
    scans: Mapping[Path, Path], ckpt: str | os.PathLike, config_file: str | Sequence[str] = ()
) -> tuple[dict[Path, dict[str, Any]], dict[Path, str]]:
    """Ask of each scan what happened to it, undo where it lies and what is no brain, and ask again.

    Args:
        scans: of each scan's file, where the mended one is written, ``.nii.gz``.
        ckpt: weights, with their population prior beside them.
        config_file: overlays of configs/inference.json, where the weights need them.

    Returns:
        of each scan's file ``verdict`` (``ok`` if the network knows it now, else ``check``), ``reasons`` against it,
        ``mended`` (the reason found before, if any), ``gain`` (bits per dim), and ``distance`` from what is usual over
        its limit, before and ``after``; and why others failed.
    """
    examiner = Examiner.of(ckpt, config_file)
    rows: dict[Path, dict[str, Any]] = {}
    failures: dict[Path, str] = {}
    for path, result in tqdm(scans.items(), "mending", unit="scan"):
        try:
            image = examiner.load(str(path))
            found = after = examiner.examine(image)
            mended = mended_scan(image, found)
            if mended is not None:
                image, after = mended, examiner.examine(mended)
            result.parent.mkdir(parents=True, exist_ok=True)
            save_nifti(result, image.as_tensor(), image.affine, image.meta.get(SPACE_CODE) or None)
        except Exception as error:  # one scan must not end the work on the others
            failures[path] = str(root_cause(error))
            continue
        row: dict[str, Any] = {"verdict": "ok", "reasons": ""}
        if not after.familiar:
            row = {"verdict": "check", "reasons": after.sentence()}
        row |= {"mended": found.reason if mended is not None else "", "gain": "" if found.gain is None else found.gain}
        rows[path] = row | {"distance": found.distance / found.limit, "after": after.distance / after.limit}
    return rows, failures
