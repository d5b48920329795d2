// What is said of two verdicts, in plain sentences.

export function patchInWords({ height, width }) {
  return `${height} × ${width} pixels`;
}

// "patch of up to 5 × 5 pixels", to follow "any" or "no".
export function threatInWords(threat) {
  const shapes = threat.shapes.map(([height, width]) => `${height} × ${width}`).join(" or ");
  const what = threat.patches === 1 ? "patch" : `set of ${threat.patches} patches`;
  return `${what} of up to ${shapes} pixels`;
}

// Does the certificate speak of this patch? Smaller ones lie inside a patch of a certified shape.
export function isCovered(threat, patch) {
  return threat.shapes.some(([height, width]) => patch.height <= height && patch.width <= width);
}

export function outcome(about, patch, clean, attacked) {
  const names = about.class_names;
  const same = clean.label === attacked.label;
  const did = same
    ? `the answer is still “${names[clean.label]}”`
    : `the answer changed from “${names[clean.label]}” to “${names[attacked.label]}”`;
  const promise = threatInWords(about.threat);
  if (!isCovered(about.threat, patch)) {
    const size = `This patch of ${patchInWords(patch)} is larger than certified (any ${promise}), so nothing is promised`;
    return { kind: same ? "open" : "changed", text: `${size}: ${did}.` };
  }
  if (!clean.certified) {
    const none = "This picture has no certificate, so a patch may change its answer";
    return { kind: same ? "open" : "changed", text: `${none}; with this one ${did}.` };
  }
  if (same) {
    const held = `The certificate held: ${did}. It is proved that no ${promise} can change it, whatever it shows.`;
    return { kind: "held", text: held };
  }
  const wrong = `The certificate was broken: ${did}, although it was proved that this cannot happen.`;
  return { kind: "broken", text: `${wrong} This is a defect; please report it with the PNG.` };
}
