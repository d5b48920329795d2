"""VNN-LIB properties as an outside verifier reads them, and a search for counterexamples with onnxruntime alone."""

import re

import numpy as np

BOUND = re.compile(r"\(assert \(([<>])= X_(\d+) ([0-9.]+)\)\)")
RIVAL = re.compile(r"\(and \(>= Y_(\d+) Y_(\d+)\)\)")


class Property:
    """The two files, read as a verifier reads them."""

    def __init__(self, path):
        import onnxruntime

        text = path.with_suffix(".vnnlib").read_text()
        self.inputs = len(re.findall(r"\(declare-const X_\d+ Real\)", text))
        self.low, self.high = np.full(self.inputs, np.nan), np.full(self.inputs, np.nan)
        for sign, place, value in BOUND.findall(text):
            (self.high if sign == "<" else self.low)[int(place)] = float(value)
        self.rivals = [(int(a), int(b)) for a, b in RIVAL.findall(text)]
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (given,) = self.session.get_inputs()
        self.name, self.shape = given.name, given.shape

    def counter_examples(self, count=400, seed=0):
        """Inputs within the bounds that meet the assertion, among corners and random contents."""
        random, found = np.random.default_rng(seed), []
        span = self.high - self.low
        for number in range(count):
            share = random.integers(0, 2, self.inputs) if number % 2 else random.random(self.inputs)
            if number % 4 == 1:  # one color everywhere
                share = random.integers(0, 2, 3).repeat(self.inputs // 3)
            point = (self.low + share * span).astype(np.float32).reshape(self.shape)
            (scores,) = self.session.run(None, {self.name: point})
            if any(scores[0, a] >= scores[0, b] for a, b in self.rivals):
                found.append(point[0])
        return found
