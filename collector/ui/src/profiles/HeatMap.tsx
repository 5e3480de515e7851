/** The heat map of time: columns are steps, rows the height of the values or the values of a label. It picks a range like the timeline. */
import { useEffect, useRef, useState } from "preact/hooks";
import type { Annotations, HeatMap as Answer, HeatRow } from "../api";
import { useWidth } from "../parts/hooks";
import { clock, integer, moment, value } from "../units";
import { AXIS_HEIGHT, Axis, Picked } from "./Axis";
import { MARKS_HEIGHT, Marks } from "./Events";
import { eventsAt } from "./eventText";
import { type SpanProps, makePlot, useSpan } from "./plot";

/** Height of all rows together, in pixels, between these limits for one row. */
const HEIGHT = 168;
const MIN_ROW = 7;
const MAX_ROW = 28;
/** Height of a row with a name. */
const NAMED_ROW = 11;

/** Name of the row for all further values of a label. */
const OTHERS = "[other]";

type Side = "main" | "base";

interface HeatMapProps extends SpanProps {
  name: string;
  answer: Answer | undefined;
  events?: Annotations | undefined;
  /** The label of the rows; empty for rows by value. */
  by: string;
  dark: boolean;
  side: Side;
  /** Selects the profiles of one row. */
  onRow: (value: string) => void;
}

const rate = (amount: number, unit: string) => `${value(amount, unit)}/s`;

/** Returns the name of a row: the value of the label, or the range of its values. */
const rowName = (row: HeatRow, unit: string): string =>
  row.low !== undefined && row.high !== undefined ? `${rate(row.low, unit)} to ${rate(row.high, unit)}` : row.name === "" ? "without this label" : (row.name ?? "");

/** Returns the colour of a cell. Lightness alone carries the value, so that every reader can distinguish it. */
function heatColour(part: number, dark: boolean, side: Side): string {
  const strength = Math.sqrt(Math.min(1, Math.max(0, part)));
  const hue = side === "base" ? 295 : 205;
  return dark ? `oklch(${(0.3 + 0.52 * strength).toFixed(3)} ${(0.03 + 0.08 * strength).toFixed(3)} ${hue})` : `oklch(${(0.94 - 0.52 * strength).toFixed(3)} ${(0.02 + 0.07 * strength).toFixed(3)} ${hue})`;
}

/** Draws all cells. A canvas, because a map may have 20,000 of them. */
function paint(canvas: HTMLCanvasElement, { rows }: Answer, size: { width: number; row: number; cell: number }, dark: boolean, side: Side) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.ceil(size.width * ratio);
  canvas.height = Math.ceil(rows.length * size.row * ratio);
  const context = canvas.getContext("2d");
  if (!context) return;
  context.scale(ratio, ratio);
  const top = rows.reduce((most, { cells }) => cells.reduce((max, cell) => Math.max(max, cell), most), 0);
  for (const [index, { cells }] of rows.entries()) {
    const y = rowTop(index, rows) * size.row;
    for (const [column, cell] of cells.entries()) {
      if (cell === 0) continue;
      context.fillStyle = heatColour(cell / top, dark, side);
      context.fillRect(column * size.cell, y, Math.max(1, size.cell - (size.cell > 4 ? 0.5 : 0)), size.row - (size.row > 8 ? 1 : 0.5));
    }
  }
}

/** Returns the position of a row from the top. High values stand above low ones, and the largest label above others. */
const rowTop = (index: number, rows: HeatRow[]): number => (rows[0]?.low !== undefined ? rows.length - 1 - index : index);

export function HeatMap(props: HeatMapProps) {
  const { answer, events, from, until, by, dark, side } = props;
  const host = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const outer = useWidth(host);
  const rows = answer?.rows ?? [];
  const unit = answer?.unit ?? "";
  const gutter = outer < 560 ? 96 : 190;
  const width = Math.max(0, outer - gutter);
  const step = answer?.step_ms || 10_000;
  const start = answer?.from_ms ?? from;
  const row = Math.min(MAX_ROW, Math.max(MIN_ROW, Math.floor(HEIGHT / Math.max(1, rows.length))));
  const height = Math.max(rows.length * row, 40);
  const plot = makePlot({ from, until, start, step }, width);
  const { cursor, picked, handlers } = useSpan(props, plot, width, gutter);
  const [active, setActive] = useState<number>();

  const cell = width * (step / plot.length);
  useEffect(() => {
    if (canvas.current && answer && width > 0) paint(canvas.current, answer, { width, row, cell }, dark, side);
  }, [answer, width, row, cell, dark, side]);

  const at = cursor === undefined ? undefined : plot.binOf(cursor);
  const shown = active === undefined ? undefined : rows[active];
  const read = () => {
    if (at === undefined) return shown ? rowName(shown, unit) : `${moment(from)} to ${moment(until)}`;
    const column = Math.round((at - start) / step);
    const near = eventsAt(events, cursor ?? at, plot, width);
    if (!shown) return clock(at) + near;
    const amount = shown.cells[column] ?? 0;
    return `${clock(at)}, ${rowName(shown, unit)}: ${by === "" ? `${integer(amount)} ${amount === 1 ? "profile" : "profiles"}` : value(amount, unit)}${near}`;
  };
  const reading = read();
  const onKeyDown = (event: KeyboardEvent) => {
    const up = event.key === "ArrowUp";
    if ((up || event.key === "ArrowDown") && rows.length > 0) {
      const here = active === undefined ? (up ? rows.length : -1) : rowTop(active, rows);
      const next = Math.min(Math.max(here + (up ? -1 : 1), 0), rows.length - 1);
      // The position of a row from the top is its own inverse.
      setActive(rowTop(next, rows));
      event.preventDefault();
    } else if (event.key === "Enter" && by !== "" && shown?.name && shown.name !== OTHERS) {
      props.onRow(shown.name);
      event.preventDefault();
    } else {
      handlers.onKeyDown(event);
    }
  };
  const named = by !== "" && row >= NAMED_ROW ? rows.map((_, index) => index) : by === "" ? [0, Math.floor(rows.length / 2), rows.length - 1].filter((index) => rows[index]) : [];
  return (
    <div class={`timeline heat ${side}`}>
      <div
        class="plot"
        ref={host}
        role="slider"
        tabIndex={0}
        aria-label={`Heat map of ${props.name.toLowerCase()} over time. Arrow keys read it, left and right with Shift pick a range, Escape clears it${by === "" ? "" : ", Enter selects a row"}.`}
        aria-valuemin={Math.round(from)}
        aria-valuemax={Math.round(until)}
        aria-valuenow={Math.round(at ?? from)}
        aria-valuetext={reading}
        {...handlers}
        onKeyDown={onKeyDown}
        onBlur={() => {
          handlers.onBlur();
          setActive(undefined);
        }}
        onPointerMove={(event) => {
          handlers.onPointerMove(event);
          const line = Math.floor((event.clientY - event.currentTarget.getBoundingClientRect().top) / row);
          setActive(line >= 0 && line < rows.length ? rowTop(line, rows) : undefined);
        }}
        onPointerLeave={() => {
          handlers.onPointerLeave();
          setActive(undefined);
        }}
      >
        {width > 0 && (
          <>
            <canvas ref={canvas} aria-hidden="true" style={{ left: `${gutter}px`, width: `${width}px`, height: `${rows.length * row}px` }} />
            <svg width={outer} height={height + MARKS_HEIGHT + AXIS_HEIGHT} aria-hidden="true">
              {named.map((index) => (
                <foreignObject key={index} x={0} y={rowTop(index, rows) * row + (row - 15) / 2} width={gutter - 8} height={15}>
                  <div class={`row-name${index === active ? " here" : ""}`}>{by === "" ? rate(((rows[index]?.low ?? 0) + (rows[index]?.high ?? 0)) / 2, unit) : rowName(rows[index] as HeatRow, unit)}</div>
                </foreignObject>
              ))}
              <g transform={`translate(${gutter},0)`}>
                <Axis from={from} until={until} width={width} height={height} plot={plot} />
                <Marks events={events} top={height} plot={plot} />
                <Picked picked={picked} height={height} plot={plot} />
                {active !== undefined && <rect class="row-here" x={0} width={width} y={rowTop(active, rows) * row} height={row} />}
                {at !== undefined && <rect class="column-here" x={plot.x(at)} width={Math.max(1, plot.x(at + step) - plot.x(at))} y={0} height={height} />}
              </g>
            </svg>
          </>
        )}
      </div>
      <div class="reading" aria-hidden="true">{rows.length === 0 ? (answer ? "no values" : "") : at !== undefined ? reading : ""}</div>
    </div>
  );
}
