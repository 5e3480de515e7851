/** The table of functions, summed over all stacks. */
import { useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import type { TopRow } from "../api";
import { useSearch } from "../flame/matches";
import { go } from "../state";
import { points, share, value } from "../units";
import type { ComparedTop } from "./useAnswers";

const COLUMNS = ["name", "file", "self", "total", "base_self", "base_total", "delta"] as const;
type Column = (typeof COLUMNS)[number];

/** Rows that the table shows at first. */
const FIRST_ROWS = 200;

interface TableProps {
  top: ComparedTop;
  redGreen: boolean;
  search: string;
  /** Column and direction from the address: `total`, `-name`, or an empty text. */
  sort: string;
  /** What a choice does, for the tooltip: `Show X in the graph`. */
  hint: (name: string) => string;
  isChosen: (row: TopRow) => boolean;
  onChoose: (row: TopRow) => void;
}

const keyOf = (row: TopRow) => `${row.name} ${row.file}`;
const ratio = (part: number | undefined, whole: number) => (whole > 0 ? (part ?? 0) / whole : 0);

/** Reads the order from the address. Names rise by default and amounts fall; a minus reverses that. */
function orderOf(sort: string, diff: boolean): { by: Column; up: boolean } {
  const column = COLUMNS.find((name) => name === sort.replace(/^-/, ""));
  const by = column && (diff || !/^base|delta/.test(column)) ? column : diff ? "delta" : "self";
  const isText = by === "name" || by === "file";
  return { by, up: isText !== (column === by && sort.startsWith("-")) };
}

/** One row can have the focus at a time: arrow keys move it, so that one press of the tab key leaves the table. */
function useRowKeys(count: number) {
  const [at, setAt] = useState(0);
  const body = useRef<HTMLTableSectionElement>(null);
  const active = Math.min(at, Math.max(0, count - 1));
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps: Record<string, number> = { ArrowDown: active + 1, ArrowUp: active - 1, PageDown: active + 20, PageUp: active - 20, Home: 0, End: count - 1 };
    const next = steps[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const row = Math.min(Math.max(0, next), count - 1);
    setAt(row);
    body.current?.rows[row]?.querySelector("button")?.focus();
  };
  return { active, body, onKeyDown, setAt };
}

export function Table(props: TableProps) {
  const { top } = props;
  const diff = top.compared;
  const found = useSearch(top.rows, props.search);
  const total = top.total ?? 0;
  const baseTotal = top.base_total ?? 0;
  const { by, up } = orderOf(props.sort, diff);
  const [more, setMore] = useState(FIRST_ROWS);
  const delta = (row: TopRow) => ratio(row.total, total) - ratio(row.base_total, baseTotal);

  const rows = useMemo(() => {
    const wanted = found ? top.rows.filter((_, at) => found.matches[at]) : top.rows;
    const key = (row: TopRow): number => (by === "delta" ? Math.abs(delta(row)) : by === "name" || by === "file" ? 0 : (row[by] ?? 0));
    const text = (row: TopRow) => (by === "file" ? (row.file ?? "") : row.name);
    const order =
      by === "name" || by === "file"
        ? (a: TopRow, b: TopRow) => text(a).localeCompare(text(b))
        : (a: TopRow, b: TopRow) => key(a) - key(b) || b.name.localeCompare(a.name);
    return [...wanted].sort((a, b) => (up ? order(a, b) : -order(a, b)));
  }, [top, found, by, up]);
  const shown = rows.slice(0, more);
  const keys = useRowKeys(shown.length);
  useLayoutEffect(() => keys.setAt(Math.max(0, shown.findIndex(props.isChosen))), [rows]);

  const sortBy = (column: Column) => {
    const reversed = by === column && up === (column === "name" || column === "file");
    go({ sort: `${reversed ? "-" : ""}${column}` }, true);
  };
  const head = (column: Column, name: string, numeric = true) => (
    <th class={numeric ? "number" : ""} aria-sort={by === column ? (up ? "ascending" : "descending") : undefined} scope="col">
      <button type="button" onClick={() => sortBy(column)}>
        {name}
        <span class={`arrow${by === column ? (up ? " up" : " down") : ""}`} aria-hidden="true" />
      </button>
    </th>
  );
  const cell = (amount: number | undefined, whole: number) => (
    <td class="number">
      <span class="meter"><i style={{ width: `${Math.min(100, 100 * ratio(amount, whole))}%` }} /></span>
      {value(amount ?? 0, top.unit)} <span class="share">{share(amount ?? 0, whole)}</span>
    </td>
  );
  return (
    <div class="table-box" tabIndex={0} role="region" aria-label="Table of functions">
      <table class={`top${diff ? " diff" : ""}${props.redGreen ? " red-green" : ""}`}>
        <thead>
          <tr>
            {head("name", "Function", false)}
            {head("file", "File", false)}
            {diff && head("delta", "Change")}
            {diff && head("base_self", "Base self")}
            {head("self", diff ? "Comp. self" : "Self")}
            {diff && head("base_total", "Base total")}
            {head("total", diff ? "Comp. total" : "Total")}
          </tr>
        </thead>
        <tbody ref={keys.body} onKeyDown={keys.onKeyDown}>
          {shown.map((row, at) => {
            const moved = delta(row);
            const chosen = props.isChosen(row);
            return (
              <tr key={keyOf(row)} class={chosen ? "chosen" : undefined}>
                <th scope="row">
                  <button type="button" title={props.hint(row.name)} tabIndex={at === keys.active ? 0 : -1} aria-current={chosen ? "true" : undefined} onFocus={() => keys.setAt(at)} onClick={() => props.onChoose(row)}>
                    {row.name}
                  </button>
                </th>
                <td class="file" title={row.file}>{row.file}</td>
                {diff && (
                  <td class={`number change ${moved >= 0.0005 ? "more" : moved <= -0.0005 ? "less" : ""}`}>{points(moved)}</td>
                )}
                {diff && cell(row.base_self, baseTotal)}
                {cell(row.self, total)}
                {diff && cell(row.base_total, baseTotal)}
                {cell(row.total, total)}
              </tr>
            );
          })}
        </tbody>
      </table>
      {rows.length === 0 && <p class={found?.error === undefined ? "dim none" : "bad none"}>{found?.error ?? "No function matches the search."}</p>}
      {rows.length > more && (
        <button type="button" class="quiet more" onClick={() => setMore(more + 1000)}>
          Show {Math.min(1000, rows.length - more)} more of {rows.length}
        </button>
      )}
    </div>
  );
}
