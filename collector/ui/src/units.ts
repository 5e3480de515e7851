/** Text forms of numbers: values of a sample type, shares, sizes, times, durations. */

const INTEGER = new Intl.NumberFormat("en");
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

const trim = (value: number, digits: number) => Number(value.toPrecision(digits)).toString();

/** Formats nanoseconds in a unit that keeps the number readable. */
export function nanoseconds(ns: number): string {
  const size = Math.abs(ns);
  if (size === 0) return "0 s";
  if (size < 1e3) return `${trim(ns, 3)} ns`;
  if (size < 1e6) return `${trim(ns / 1e3, 3)} µs`;
  if (size < 1e9) return `${trim(ns / 1e6, 3)} ms`;
  if (size < 120e9) return `${trim(ns / 1e9, 3)} s`;
  if (size < 7200e9) return `${trim(ns / 60e9, 3)} min`;
  return `${trim(ns / 3600e9, 3)} h`;
}

export const duration = (ms: number): string => nanoseconds(ms * 1e6);

/** Formats the time that a node took to answer, which the API gives in whole milliseconds. */
export const took = (ms: number): string => (ms < 1 ? "<1 ms" : duration(ms));

export function bytes(count: number): string {
  if (count < 1024) return `${count} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let value = count;
  let at = -1;
  while (value >= 1024 && at < units.length - 1) {
    value /= 1024;
    at += 1;
  }
  return `${trim(value, 3)} ${units[at]}`;
}

export const integer = (count: number): string => INTEGER.format(count);
export const compact = (count: number): string => (Math.abs(count) < 10_000 ? integer(count) : COMPACT.format(count));

/** Formats a value of a sample type with this unit. */
export function value(amount: number, unit: string): string {
  if (unit === "nanoseconds") return nanoseconds(amount);
  if (unit === "bytes") return bytes(amount);
  return unit === "count" || unit === "" ? compact(amount) : `${compact(amount)} ${unit}`;
}

/** Formats a share: `12.3%`. A share that would round to 0 is `<0.1%`. */
export function share(part: number, whole: number): string {
  if (!(whole > 0)) return "0%";
  const percent = (100 * part) / whole;
  if (percent === 0) return "0%";
  if (percent > 0 && percent < 0.05) return "<0.1%";
  return `${percent >= 99.95 ? Math.round(percent) : percent.toFixed(1)}%`;
}

/** Formats a difference of two shares in percentage points: `+1.2 pp`. */
export function points(difference: number): string {
  const pp = 100 * difference;
  if (Math.abs(pp) < 0.05) return "±0.0 pp";
  return `${pp > 0 ? "+" : "−"}${Math.abs(pp).toFixed(1)} pp`;
}

const two = (part: number) => String(part).padStart(2, "0");

export function clock(ms: number, seconds = true): string {
  const date = new Date(ms);
  return `${two(date.getHours())}:${two(date.getMinutes())}${seconds ? `:${two(date.getSeconds())}` : ""}`;
}

export function day(ms: number): string {
  const date = new Date(ms);
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
}

export const moment = (ms: number): string => `${day(ms)} ${clock(ms)}`;

/** Formats a time, without the date if it is today. */
export const when = (ms: number): string => (day(ms) === day(Date.now()) ? clock(ms) : moment(ms));

export function ago(ms: number, now: number): string {
  const seconds = Math.max(0, Math.round((now - ms) / 1000));
  if (seconds < 2) return "now";
  if (seconds < 120) return `${seconds} s ago`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 172_800) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86_400)} days ago`;
}

const TYPES: Record<string, string> = {
  "cpu/nanoseconds": "CPU time",
  "samples/count": "CPU samples",
  "offcpu/nanoseconds": "Off-CPU time",
  "events/count": "Off-CPU events",
};

/** Returns the name of a sample type for people. */
export const typeName = (type: string): string => TYPES[type] ?? type;
