/** The time axis of a plot, and the picked range on it. */
import type { Span } from "../state";
import { clock, day } from "../units";
import { MARKS_HEIGHT } from "./Events";
import { type Plot, ticks } from "./plot";

/** Height of the names of moments, in pixels. */
export const AXIS_HEIGHT = 18;

export function Axis({ from, until, width, height, plot: { x, length } }: { from: number; until: number; width: number; height: number; plot: Plot }) {
  return (
    <>
      {ticks(from, until, width).map((tick) => (
        <g key={tick} transform={`translate(${x(tick).toFixed(1)},0)`}>
          <line class="grid" y1={0} y2={height} />
          <text class="tick" y={height + MARKS_HEIGHT + AXIS_HEIGHT - 4} text-anchor={x(tick) < 24 ? "start" : x(tick) > width - 24 ? "end" : "middle"}>
            {length > 2 * 86_400e3 ? day(tick).slice(5) : clock(tick, length < 600e3)}
          </text>
        </g>
      ))}
      <line class="axis" x1={0} x2={width} y1={height + 0.5} y2={height + 0.5} />
    </>
  );
}

export function Picked({ picked, height, plot: { x } }: { picked: Span | undefined; height: number; plot: Plot }) {
  if (!picked) return null;
  return (
    <g class="span">
      <rect x={x(picked[0])} width={Math.max(1, x(picked[1]) - x(picked[0]))} y={0} height={height} />
      <line x1={x(picked[0])} x2={x(picked[0])} y1={0} y2={height} />
      <line x1={x(picked[1])} x2={x(picked[1])} y1={0} y2={height} />
    </g>
  );
}
