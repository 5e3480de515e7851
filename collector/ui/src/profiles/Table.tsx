/** The table of functions, summed over all stacks. A click shows a function in the graph. */
import { useMemo, useState } from "preact/hooks";
import type { Top, TopRow } from "../api";
import { points, share, value } from "../units";

type Column = "name" | "file" | "self" | "total" | "base_self" | "base_total" | "delta";

/** Rows that the table shows at first. */
const FIRST_ROWS = 200;

export function Table(props: { top: Top; diff: boolean; blind: boolean; search: string; matches: (name: string) => boolean; onFocus: (name: string) => void }) {
  const { top, diff, search, matches } = props;
  const total = top.total ?? 0;
  const baseTotal = top.base_total ?? 0;
  const [sort, setSort] = useState<{ by: Column; up: boolean }>();
  const { by, up } = sort ?? { by: diff ? ("delta" as const) : ("self" as const), up: false };
  const [more, setMore] = useState(FIRST_ROWS);
  const ratio = (part: number | undefined, whole: number) => (whole > 0 ? (part ?? 0) / whole : 0);
  const delta = (row: TopRow) => ratio(row.total, total) - ratio(row.base_total, baseTotal);

  const rows = useMemo(() => {
    const wanted = search === "" ? top.rows : top.rows.filter((row) => matches(row.name));
    const key = (row: TopRow): number => (by === "delta" ? Math.abs(delta(row)) : by === "name" || by === "file" ? 0 : (row[by] ?? 0));
    const text = (row: TopRow) => (by === "file" ? (row.file ?? "") : row.name);
    const order =
      by === "name" || by === "file"
        ? (a: TopRow, b: TopRow) => text(a).localeCompare(text(b))
        : (a: TopRow, b: TopRow) => key(a) - key(b) || b.name.localeCompare(a.name);
    return [...wanted].sort((a, b) => (up ? order(a, b) : -order(a, b)));
  }, [top, search, by, up]);

  const head = (column: Column, name: string, numeric = true) => (
    <th class={numeric ? "number" : ""} aria-sort={by === column ? (up ? "ascending" : "descending") : undefined} scope="col">
      <button type="button" onClick={() => setSort({ by: column, up: by === column ? !up : !numeric })}>
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
      <table class={`top${diff ? " diff" : ""}${props.blind ? " blind" : ""}`}>
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
        <tbody>
          {rows.slice(0, more).map((row) => {
            const moved = delta(row);
            return (
              <tr key={`${row.name} ${row.file}`}>
                <th scope="row">
                  <button type="button" title={`Show ${row.name} in the graph`} onClick={() => props.onFocus(row.name)}>
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
      {rows.length === 0 && <p class="dim none">No function matches the search.</p>}
      {rows.length > more && (
        <button type="button" class="quiet more" onClick={() => setMore(more + 1000)}>
          Show {Math.min(1000, rows.length - more)} more of {rows.length}
        </button>
      )}
    </div>
  );
}
