/** The note of what the collector read for the graph, with its parts in a box. */
import type { ReadReport } from "../api";
import { Popover } from "../parts/Popover";
import { bytes, duration, integer } from "../units";

interface Part {
  from: string;
  profiles: number;
  /** Undefined: nothing was read. */
  size: number | undefined;
}

/** Returns the places that the values come from. */
function partsOf(read: ReadReport): Part[] {
  const { segment_profiles = 0, segment_bytes = 0, table_profiles = 0, table_bytes = 0 } = read;
  const { sum_profiles = 0, sum_bytes = 0, cached_profiles = 0 } = read;
  const all: Part[] = [
    { from: "Stored profiles, one by one", profiles: segment_profiles, size: segment_bytes },
    { from: "Sums by minute or hour", profiles: sum_profiles, size: sum_bytes },
    { from: "Tables, by ClickHouse", profiles: table_profiles, size: table_bytes },
    { from: "Of these from an earlier query", profiles: cached_profiles, size: undefined },
  ];
  return all.filter(({ profiles, size = 0 }) => profiles > 0 || size > 0);
}

export function ReadNote({ read }: { read: ReadReport | null | undefined }) {
  if (!read) return null;
  const { segment_bytes = 0, table_bytes = 0, sum_bytes = 0, took_ms = 0 } = read;
  const parts = partsOf(read);
  const size = segment_bytes + table_bytes + sum_bytes;
  const took = took_ms < 1 ? "<1 ms" : duration(Math.round(took_ms));
  const text = size === 0 && parts.length > 0 ? `from memory in ${took}` : `${bytes(size)} read in ${took}`;
  return (
    <Popover class="read" name={`What the collector read: ${text}`} label={text}>
      {() => (
        <table>
          <thead>
            <tr><th scope="col">Values from</th><th scope="col" class="number">Profiles</th><th scope="col" class="number">Read</th></tr>
          </thead>
          <tbody>
            {parts.map(({ from, profiles, size: read }) => (
              <tr key={from}>
                <th scope="row">{from}</th>
                <td class="number">{integer(profiles)}</td>
                <td class="number">{read === undefined ? "nothing" : bytes(read)}</td>
              </tr>
            ))}
            {parts.length === 0 && <tr><td colSpan={3}>No profile is in the selection.</td></tr>}
          </tbody>
        </table>
      )}
    </Popover>
  );
}
