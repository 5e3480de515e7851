/** Times as people write them: `now`, `now-15m`, milliseconds, or RFC 3339. */

const UNITS: Record<string, number> = { s: 1e3, m: 60e3, h: 3600e3, d: 86_400e3, w: 604_800e3 };

export function resolve(text: string, now: number): number | undefined {
  const relative = /^now(?:-(\d+)([smhdw]))?$/.exec(text.trim());
  if (relative) return now - Number(relative[1] ?? 0) * (UNITS[relative[2] ?? "s"] ?? 0);
  if (/^\d{1,15}$/.test(text)) return Number(text);
  const parsed = Date.parse(text);
  return Number.isNaN(parsed) ? undefined : parsed;
}

export const isRelative = (text: string): boolean => text.startsWith("now");

export const PRESETS: [from: string, name: string][] = [
  ["now-5m", "Last 5 minutes"],
  ["now-15m", "Last 15 minutes"],
  ["now-1h", "Last hour"],
  ["now-3h", "Last 3 hours"],
  ["now-12h", "Last 12 hours"],
  ["now-24h", "Last 24 hours"],
  ["now-7d", "Last 7 days"],
  ["now-30d", "Last 30 days"],
];

export const SHIFTS: [ms: number, name: string][] = [
  [0, "same window"],
  [3600e3, "1 hour earlier"],
  [86_400e3, "1 day earlier"],
  [604_800e3, "1 week earlier"],
];

const STEPS = [10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800, 604_800];

/** Returns a round step, of which the range has up to 120. */
export function niceStep(length: number): number {
  return (STEPS.find((seconds) => length / (seconds * 1e3) <= 120) ?? Math.ceil(length / 604_800e3 / 120) * 604_800) * 1e3;
}

/** Formats a time for `<input type="datetime-local">`. */
export function toLocalInput(ms: number): string {
  const date = new Date(ms - new Date(ms).getTimezoneOffset() * 60e3);
  return date.toISOString().slice(0, 19);
}
