/** The value over time: hover reads it, dragging picks a part of it, and so do the arrow keys with Shift. */
import { useMemo, useRef, useState } from "preact/hooks";
import type { Timeline as Answer } from "../api";
import { useWidth } from "../parts";
import type { Span } from "../state";
import { clock, day, integer, moment, value } from "../units";

const HEIGHT = 96;
const AXIS = 18;

const TICKS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800, 604_800];

function ticks(from: number, until: number, width: number): number[] {
  const room = Math.max(2, Math.floor(width / 90));
  const step = (TICKS.find((seconds) => (until - from) / (seconds * 1e3) <= room) ?? 2_592_000) * 1e3;
  // Days begin at midnight where the reader is.
  const zone = new Date(from).getTimezoneOffset() * 60e3;
  const list: number[] = [];
  for (let at = Math.ceil((from - zone) / step) * step + zone; at < until; at += step) list.push(at);
  return list;
}

export function Timeline(props: {
  name: string;
  answer: Answer | undefined;
  from: number;
  until: number;
  span: Span | undefined;
  /** `main`, `base`: which colour it has. */
  side: string;
  onSpan: (span: Span | undefined) => void;
}) {
  const { answer, from, until, span, side } = props;
  const host = useRef<HTMLDivElement>(null);
  const width = useWidth(host);
  const [cursor, setCursor] = useState<number>();
  const [drag, setDrag] = useState<[number, number]>();
  const anchor = useRef<number | undefined>(undefined);
  const step = answer?.step_ms || 10_000;
  const unit = answer?.unit ?? "";
  const points = answer?.points ?? [];
  const top = useMemo(() => points.reduce((most, point) => Math.max(most, point.value ?? 0), 0), [points]);
  const length = Math.max(1, until - from);
  const x = (at: number) => ((Math.min(Math.max(at, from), until) - from) / length) * width;
  // The reading stands above the highest bar.
  const plot = HEIGHT - AXIS - 16;

  const bins = useMemo(() => new Map(points.map((point) => [point.t_ms, point])), [points]);
  const start = points[0]?.t_ms ?? from;
  const binOf = (at: number) => start + Math.floor((at - start) / step) * step;
  const at = (event: PointerEvent) => {
    const left = host.current?.getBoundingClientRect().left ?? 0;
    return from + (Math.min(Math.max(event.clientX - left, 0), width) / Math.max(1, width)) * length;
  };
  /** Whole steps: a profile belongs to the bar that it was counted in. */
  const snap = (one: number, other: number): Span => {
    const [low, high] = one < other ? [one, other] : [other, one];
    return [Math.round(Math.max(from, binOf(low))), Math.round(Math.min(until, binOf(high) + step))];
  };
  const said = (when: number) => {
    const point = bins.get(binOf(when));
    return `${clock(binOf(when))}: ${value(point?.value ?? 0, unit)}, ${integer(point?.profiles ?? 0)} ${point?.profiles === 1 ? "profile" : "profiles"}`;
  };

  const onKeyDown = (event: KeyboardEvent) => {
    const here = cursor ?? (event.key === "ArrowLeft" ? until : from - step / 2);
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const next = Math.min(Math.max(here + (event.key === "ArrowLeft" ? -step : step), from), until - 1);
      setCursor(next);
      if (event.shiftKey) {
        anchor.current ??= Math.min(Math.max(here, from), until - 1);
        props.onSpan(snap(anchor.current, next));
      } else {
        anchor.current = undefined;
      }
    } else if (event.key === "Escape" && span) {
      anchor.current = undefined;
      props.onSpan(undefined);
    } else {
      return;
    }
    event.preventDefault();
  };

  const picked = drag ? snap(...drag) : span;
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
        aria-valuetext={cursor === undefined ? `${moment(from)} to ${moment(until)}` : said(cursor)}
        onKeyDown={onKeyDown}
        onBlur={() => setCursor(undefined)}
        onPointerDown={(event) => {
          if (event.button !== 0) return;
          event.currentTarget.setPointerCapture(event.pointerId);
          setDrag([at(event), at(event)]);
        }}
        onPointerMove={(event) => {
          setCursor(at(event));
          if (drag) setDrag([drag[0], at(event)]);
        }}
        onPointerUp={(event) => {
          if (!drag) return;
          const moved = Math.abs(x(drag[0]) - x(at(event))) > 3;
          // A mere click clears; a drag picks.
          props.onSpan(moved ? snap(drag[0], at(event)) : undefined);
          setDrag(undefined);
        }}
        onPointerCancel={() => setDrag(undefined)}
        onPointerLeave={() => setCursor(undefined)}
      >
        {width > 0 && (
          <svg width={width} height={HEIGHT} aria-hidden="true">
            {ticks(from, until, width).map((tick) => (
              <g key={tick} transform={`translate(${x(tick).toFixed(1)},0)`}>
                <line class="grid" y1={0} y2={HEIGHT - AXIS} />
                <text class="tick" y={HEIGHT - 4} text-anchor={x(tick) < 24 ? "start" : x(tick) > width - 24 ? "end" : "middle"}>
                  {length > 2 * 86_400e3 ? day(tick).slice(5) : clock(tick, length < 600e3)}
                </text>
              </g>
            ))}
            <line class="axis" x1={0} x2={width} y1={HEIGHT - AXIS + 0.5} y2={HEIGHT - AXIS + 0.5} />
            {points.map((point) => {
              const height = top > 0 ? ((point.value ?? 0) / top) * plot : 0;
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
                  y={(HEIGHT - AXIS - Math.max(1.5, height)).toFixed(1)}
                  height={Math.max(1.5, height).toFixed(1)}
                  rx={wide > 6 ? 1.5 : 0}
                />
              );
            })}
            {picked && (
              <g class="span">
                <rect x={x(picked[0])} width={Math.max(1, x(picked[1]) - x(picked[0]))} y={0} height={HEIGHT - AXIS} />
                <line x1={x(picked[0])} x2={x(picked[0])} y1={0} y2={HEIGHT - AXIS} />
                <line x1={x(picked[1])} x2={x(picked[1])} y1={0} y2={HEIGHT - AXIS} />
              </g>
            )}
            {shown !== undefined && cursor !== undefined && <line class="cursor" x1={x(cursor)} x2={x(cursor)} y1={0} y2={HEIGHT - AXIS} />}
          </svg>
        )}
      </div>
      <div class="reading" aria-hidden="true">
        {cursor !== undefined && answer ? said(cursor) : top > 0 ? `peak ${value(top, unit)} in ${value(step * 1e6, "nanoseconds")}` : "nothing here"}
      </div>
    </div>
  );
}
