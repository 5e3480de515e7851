/** The value over time. Hovering or arrow keys read a bar; dragging, or arrow keys with Shift, pick a range. */
import { useMemo, useRef, useState } from "preact/hooks";
import type { Timeline as Answer } from "../api";
import { useWidth } from "../parts/hooks";
import type { Span } from "../state";
import { clock, day, integer, moment, value } from "../units";

const HEIGHT = 96;
const AXIS_HEIGHT = 18;
/** Room above the highest bar for the text of the reading. */
const READING_HEIGHT = 16;
const BASE_LINE = HEIGHT - AXIS_HEIGHT;

const TICK_SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800, 604_800];

interface TimelineProps {
  name: string;
  answer: Answer | undefined;
  from: number;
  until: number;
  span: Span | undefined;
  /** Chooses the colour: `main` or `base`. */
  side: string;
  onSpan: (span: Span | undefined) => void;
}

function ticks(from: number, until: number, width: number): number[] {
  const room = Math.max(2, Math.floor(width / 90));
  const step = (TICK_SECONDS.find((seconds) => (until - from) / (seconds * 1e3) <= room) ?? 2_592_000) * 1e3;
  // Days start at midnight in the time zone of the reader.
  const zone = new Date(from).getTimezoneOffset() * 60e3;
  const list: number[] = [];
  for (let at = Math.ceil((from - zone) / step) * step + zone; at < until; at += step) list.push(at);
  return list;
}

/** The bars of an answer, and where they are on the screen. */
function usePlot({ answer, from, until }: TimelineProps, width: number) {
  const step = answer?.step_ms || 10_000;
  const points = answer?.points ?? [];
  const top = useMemo(() => points.reduce((max, point) => Math.max(max, point.value ?? 0), 0), [points]);
  const bins = useMemo(() => new Map(points.map((point) => [point.t_ms, point])), [points]);
  const length = Math.max(1, until - from);
  const start = points[0]?.t_ms ?? from;
  const binOf = (at: number) => start + Math.floor((at - start) / step) * step;
  return {
    step,
    points,
    top,
    length,
    binOf,
    x: (at: number) => ((Math.min(Math.max(at, from), until) - from) / length) * width,
    /** Extends a range to whole bars, because a profile belongs to the bar that counts it. */
    snap: (one: number, other: number): Span => {
      const [low, high] = one < other ? [one, other] : [other, one];
      return [Math.round(Math.max(from, binOf(low))), Math.round(Math.min(until, binOf(high) + step))];
    },
    read: (at: number) => {
      const point = bins.get(binOf(at));
      return `${clock(binOf(at))}: ${value(point?.value ?? 0, answer?.unit ?? "")}, ${integer(point?.profiles ?? 0)} ${point?.profiles === 1 ? "profile" : "profiles"}`;
    },
  };
}

type Plot = ReturnType<typeof usePlot>;

/** The cursor and the drag, with the handlers of keys and of the pointer that move them. */
function useSpan({ from, until, span, onSpan }: TimelineProps, { step, length, x, snap }: Plot, width: number) {
  const [cursor, setCursor] = useState<number>();
  const [drag, setDrag] = useState<[number, number]>();
  const anchor = useRef<number | undefined>(undefined);
  const timeAt = (event: PointerEvent & { currentTarget: HTMLElement }) => {
    const { left } = event.currentTarget.getBoundingClientRect();
    return from + (Math.min(Math.max(event.clientX - left, 0), width) / Math.max(1, width)) * length;
  };
  const onKeyDown = (event: KeyboardEvent) => {
    const here = cursor ?? (event.key === "ArrowLeft" ? until : from - step / 2);
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const next = Math.min(Math.max(here + (event.key === "ArrowLeft" ? -step : step), from), until - 1);
      setCursor(next);
      if (event.shiftKey) {
        anchor.current ??= Math.min(Math.max(here, from), until - 1);
        onSpan(snap(anchor.current, next));
      } else {
        anchor.current = undefined;
      }
    } else if (event.key === "Escape" && span) {
      anchor.current = undefined;
      onSpan(undefined);
    } else {
      return;
    }
    event.preventDefault();
  };
  const handlers = {
    onKeyDown,
    onBlur: () => setCursor(undefined),
    onPointerDown: (event: PointerEvent & { currentTarget: HTMLElement }) => {
      if (event.button !== 0) return;
      event.currentTarget.setPointerCapture(event.pointerId);
      setDrag([timeAt(event), timeAt(event)]);
    },
    onPointerMove: (event: PointerEvent & { currentTarget: HTMLElement }) => {
      setCursor(timeAt(event));
      if (drag) setDrag([drag[0], timeAt(event)]);
    },
    onPointerUp: (event: PointerEvent & { currentTarget: HTMLElement }) => {
      if (!drag) return;
      const moved = Math.abs(x(drag[0]) - x(timeAt(event))) > 3;
      // A click without a drag clears the range.
      onSpan(moved ? snap(drag[0], timeAt(event)) : undefined);
      setDrag(undefined);
    },
    onPointerCancel: () => setDrag(undefined),
    onPointerLeave: () => setCursor(undefined),
  };
  return { cursor, picked: drag ? snap(...drag) : span, handlers };
}

function Axis({ from, until, width, plot: { x, length } }: { from: number; until: number; width: number; plot: Plot }) {
  return (
    <>
      {ticks(from, until, width).map((tick) => (
        <g key={tick} transform={`translate(${x(tick).toFixed(1)},0)`}>
          <line class="grid" y1={0} y2={BASE_LINE} />
          <text class="tick" y={HEIGHT - 4} text-anchor={x(tick) < 24 ? "start" : x(tick) > width - 24 ? "end" : "middle"}>
            {length > 2 * 86_400e3 ? day(tick).slice(5) : clock(tick, length < 600e3)}
          </text>
        </g>
      ))}
      <line class="axis" x1={0} x2={width} y1={BASE_LINE + 0.5} y2={BASE_LINE + 0.5} />
    </>
  );
}

/** The bars; those outside of the picked range are pale, and the one under the cursor is marked. */
function Bars({ plot: { points, step, top, x }, picked, shown }: { plot: Plot; picked: Span | undefined; shown: number | undefined }) {
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
      {picked && (
        <g class="span">
          <rect x={x(picked[0])} width={Math.max(1, x(picked[1]) - x(picked[0]))} y={0} height={BASE_LINE} />
          <line x1={x(picked[0])} x2={x(picked[0])} y1={0} y2={BASE_LINE} />
          <line x1={x(picked[1])} x2={x(picked[1])} y1={0} y2={BASE_LINE} />
        </g>
      )}
    </>
  );
}

export function Timeline(props: TimelineProps) {
  const { answer, from, until, side } = props;
  const host = useRef<HTMLDivElement>(null);
  const width = useWidth(host);
  const plot = usePlot(props, width);
  const { cursor, picked, handlers } = useSpan(props, plot, width);
  const { top, step, x, binOf, read } = plot;
  const shown = cursor === undefined ? undefined : binOf(cursor);
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
        aria-valuetext={cursor === undefined ? `${moment(from)} to ${moment(until)}` : read(cursor)}
        {...handlers}
      >
        {width > 0 && (
          <svg width={width} height={HEIGHT} aria-hidden="true">
            <Axis from={from} until={until} width={width} plot={plot} />
            <Bars plot={plot} picked={picked} shown={shown} />
            {cursor !== undefined && <line class="cursor" x1={x(cursor)} x2={x(cursor)} y1={0} y2={BASE_LINE} />}
          </svg>
        )}
      </div>
      <div class="reading" aria-hidden="true">
        {cursor !== undefined && answer ? read(cursor) : top > 0 ? `peak ${value(top, answer?.unit ?? "")} in ${value(step * 1e6, "nanoseconds")}` : "no values"}
      </div>
    </div>
  );
}
