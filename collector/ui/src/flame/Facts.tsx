/** Values of one frame, for the tooltip, the line below the graph, and screen readers. */
import { points, share, value } from "../units";
import type { FrameData, Frames } from "./frames";

interface FactsProps {
  frame: FrameData;
  frames: Frames;
  /** False in a graph of callers, in which no value ends. */
  hasSelf: boolean;
}

/** Returns how much of a frame rests on a guess: `guessed`, `12% guessed`, or an empty text. */
const guessOf = ({ guessed }: FrameData): string => (guessed === 0 ? "" : guessed === 1 ? "guessed" : `${share(guessed, 1)} guessed`);

/** Returns one sentence for screen readers. */
export function describe({ frame, frames: { unit, total, baseTotal, diff }, hasSelf }: FactsProps): string {
  const kind = [frame.kernel ? "kernel" : "", frame.inlined ? "inlined" : "", guessOf(frame)].filter(Boolean).map((word) => `, ${word}`).join("");
  if (!diff) {
    return `${frame.name}, ${share(frame.total, total)}, ${value(frame.total, unit)}${hasSelf ? `, self ${value(frame.self, unit)}` : ""}${kind}`;
  }
  return `${frame.name}, ${points(frame.delta)}: ${share(frame.baseTotal, baseTotal)} in the base, ${share(frame.total, total)} in the comparison${kind}`;
}

function Comparison({ frame, frames: { unit, total, baseTotal }, hasSelf }: FactsProps) {
  const selfDelta = (total > 0 ? frame.self / total : 0) - (baseTotal > 0 ? frame.baseSelf / baseTotal : 0);
  return (
    <table class="facts-table">
      <thead>
        <tr><td /><th>base</th><th>comparison</th><th>change</th></tr>
      </thead>
      <tbody>
        <tr>
          <th>total</th>
          <td>{value(frame.baseTotal, unit)} <span>{share(frame.baseTotal, baseTotal)}</span></td>
          <td>{value(frame.total, unit)} <span>{share(frame.total, total)}</span></td>
          <td>{points(frame.delta)}</td>
        </tr>
        {hasSelf && (
          <tr>
            <th>self</th>
            <td>{value(frame.baseSelf, unit)} <span>{share(frame.baseSelf, baseTotal)}</span></td>
            <td>{value(frame.self, unit)} <span>{share(frame.self, total)}</span></td>
            <td>{points(selfDelta)}</td>
          </tr>
        )}
      </tbody>
    </table>
  );
}

function Values({ frame, frames: { unit, total }, hasSelf }: FactsProps) {
  return (
    <dl class="facts-values">
      <div><dt>total</dt><dd>{value(frame.total, unit)}</dd><dd class="dim">{share(frame.total, total)}</dd></div>
      {hasSelf && <div><dt>self</dt><dd>{value(frame.self, unit)}</dd><dd class="dim">{share(frame.self, total)}</dd></div>}
    </dl>
  );
}

export function Facts(props: FactsProps) {
  const { frame } = props;
  const kind = [frame.kernel ? "kernel" : "", frame.inlined ? "inlined" : ""].filter(Boolean).join(", ");
  return (
    <>
      <div class="facts-name">{frame.name}</div>
      <div class="facts-file">
        {frame.file || (frame.special ? "not a function" : "unknown binary")}
        {kind && ` · ${kind}`}
      </div>
      {frame.guessed > 0 && (
        <div class="facts-guess">
          {guessOf(frame)}: {props.frames.data(0).key === frame.key ? "frames of these stacks were" : "it or a function that it called was"} found by frame pointer, without an unwind table, and may be wrong
        </div>
      )}
      {props.frames.diff ? <Comparison {...props} /> : <Values {...props} />}
    </>
  );
}
