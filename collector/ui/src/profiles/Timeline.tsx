/** The value over time. Hovering or arrow keys read a bar; dragging, or arrow keys with Shift, pick a range. */
import { useMemo, useRef } from "preact/hooks";
import type { Annotations, Timeline as Answer } from "../api";
import { useWidth } from "../parts/hooks";
import type { Span } from "../state";
import { clock, integer, moment, value } from "../units";
import { AXIS_HEIGHT, Axis, Picked } from "./Axis";
import { MARKS_HEIGHT, Marks } from "./Events";
import { eventsAt } from "./eventText";
import { type Plot, type SpanProps, makePlot, useSpan } from "./plot";

const HEIGHT = 108;
/** Room above the highest bar for the text of the reading. */
const READING_HEIGHT = 16;
const BASE_LINE = HEIGHT - AXIS_HEIGHT - MARKS_HEIGHT;

interface TimelineProps extends SpanProps {
  name: string;
  answer: Answer | undefined;
  events?: Annotations | undefined;
  /** Chooses the colour: `main` or `base`. */
  side: "main" | "base";
}

/** The bars; those outside of the picked range are pale, and the one under the cursor is marked. */
function Bars({ points, top, plot: { step, x }, picked, shown }: { points: Answer["points"]; top: number; plot: Plot; picked: Span | undefined; shown: number | undefined }) {
  return (
    <>
      {points.map((point) => {
        const height = top > 0 ? ((point.value ?? 0) / top) * (BASE_LINE - READING_HEIGHT) : 0;
        const left = x(point.t_ms);
        const wide = x(point.t_ms + step) - left;
        if (height <= 0 || wide <= 0) return null;
        const inside = !picked || (point.t_ms + step > picked[0] && point.t_ms < picked[1]);
        return (
          <rect
            key={point.t_ms}
            class={`bar${inside ? "" : " out"}${point.t_ms === shown ? " here" : ""}`}
            x={left.toFixed(1)}
            width={Math.max(1, wide - (wide > 4 ? 1 : 0)).toFixed(1)}
            y={(BASE_LINE - Math.max(1.5, height)).toFixed(1)}
            height={Math.max(1.5, height).toFixed(1)}
            rx={wide > 6 ? 1.5 : 0}
          />
        );
      })}
    </>
  );
}

export function Timeline(props: TimelineProps) {
  const { answer, events, from, until, side } = props;
  const host = useRef<HTMLDivElement>(null);
  const width = useWidth(host);
  const points = answer?.points ?? [];
  const top = useMemo(() => points.reduce((max, point) => Math.max(max, point.value ?? 0), 0), [points]);
  const bins = useMemo(() => new Map(points.map((point) => [point.t_ms, point])), [points]);
  const plot = makePlot({ from, until, start: points[0]?.t_ms ?? from, step: answer?.step_ms || 10_000 }, width);
  const { cursor, picked, handlers } = useSpan(props, plot, width);
  const { step, x, binOf } = plot;
  const shown = cursor === undefined ? undefined : binOf(cursor);
  const read = (at: number) => {
    const point = bins.get(binOf(at));
    return `${clock(binOf(at))}: ${value(point?.value ?? 0, answer?.unit ?? "")}, ${integer(point?.profiles ?? 0)} ${point?.profiles === 1 ? "profile" : "profiles"}${eventsAt(events, at, plot, width)}`;
  };
  const reading = cursor === undefined ? undefined : read(cursor);
  return (
    <div class={`timeline ${side}`}>
      <div
        class="plot"
        ref={host}
        role="slider"
        tabIndex={0}
        aria-label={`${props.name} over time. Arrow keys read it, with Shift they pick a range, Escape clears it.`}
        aria-valuemin={Math.round(from)}
        aria-valuemax={Math.round(until)}
        aria-valuenow={Math.round(shown ?? from)}
        aria-valuetext={reading ?? `${moment(from)} to ${moment(until)}`}
        {...handlers}
      >
        {width > 0 && (
          <svg width={width} height={HEIGHT} aria-hidden="true">
            <Axis from={from} until={until} width={width} height={BASE_LINE} plot={plot} />
            <Bars points={points} top={top} plot={plot} picked={picked} shown={shown} />
            <Marks events={events} top={BASE_LINE} plot={plot} />
            <Picked picked={picked} height={BASE_LINE} plot={plot} />
            {cursor !== undefined && <line class="cursor" x1={x(cursor)} x2={x(cursor)} y1={0} y2={BASE_LINE} />}
          </svg>
        )}
      </div>
      <div class="reading" aria-hidden="true">
        {reading !== undefined && answer ? reading : top > 0 ? `peak ${value(top, answer?.unit ?? "")} in ${value(step * 1e6, "nanoseconds")}` : "no values"}
      </div>
    </div>
  );
}
