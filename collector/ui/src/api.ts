/** Requests to the HTTP API of the collector. Every failure is an `ApiError` with a message for people. */

export interface FlameNode {
  name: string;
  file?: string;
  total?: number;
  self?: number;
  base_total?: number;
  base_self?: number;
  /** The part of `total` in which this frame was found by a guess, or rests on one. */
  guessed?: number;
  base_guessed?: number;
  kernel?: boolean;
  inlined?: boolean;
  children?: FlameNode[];
}

/** Where the values of an answer come from, and what the collector read for them. A comparison has the sum over both sides. */
export interface ReadReport {
  /** Profiles read one by one, and their compressed bytes. */
  segment_profiles?: number;
  segment_bytes?: number;
  /** Profiles that ClickHouse added up from the tables. */
  table_profiles?: number;
  table_bytes?: number;
  /** Profiles whose sums by minute or hour the collector read from the tables. */
  sum_profiles?: number;
  sum_bytes?: number;
  /** Those of all these whose merge was in memory from an earlier query. */
  cached_profiles?: number;
  took_ms?: number;
}

export interface FlameGraph {
  unit: string;
  sample_type: string;
  total?: number;
  base_total?: number;
  profiles?: number;
  base_profiles?: number;
  /** Profiles that the graph lacks, because their files are damaged. */
  unreadable_profiles?: number;
  /** The collector ran out of time while it searched debug information for names. */
  names_incomplete?: boolean;
  read?: ReadReport | null;
  root?: FlameNode;
}

export interface TopRow {
  name: string;
  file?: string;
  self?: number;
  total?: number;
  base_self?: number;
  base_total?: number;
}

export interface Top {
  unit: string;
  sample_type: string;
  total?: number;
  base_total?: number;
  rows: TopRow[];
}

export interface Timeline {
  unit: string;
  sample_type: string;
  step_ms: number;
  points: { t_ms: number; value?: number; profiles?: number }[];
}

/** One row of a heat map: a value of a label, or the values from `low` to `high` for each second of a profile. */
export interface HeatRow {
  name?: string;
  low?: number;
  high?: number;
  cells: number[];
}

export interface HeatMap {
  unit: string;
  sample_type: string;
  from_ms: number;
  step_ms: number;
  rows: HeatRow[];
}

/** A change of the rules, from the audit log. */
export interface ChangeEvent {
  at_ms: number;
  action: string;
  who: string;
  scope: string;
  revision: number;
  added: string[];
  removed: string[];
  changed: string[];
  note: string;
}

/** A capture that a condition or a person started. */
export interface CaptureEvent {
  rule_id: string;
  start_ms: number;
  end_ms: number;
  reason: string;
  profiles: number;
  services: string[];
  nodes: string[];
}

export interface Annotations {
  changes: ChangeEvent[];
  older_changes: number;
  captures: CaptureEvent[];
  older_captures: number;
}

export interface Series {
  labels: Record<string, string>;
  profiles: number;
  samples: number;
  first_ms: number;
  last_ms: number;
  sample_types: string[];
}

export interface ProfileInfo {
  id: string;
  labels: Record<string, string>;
  start_ms: number;
  duration_ms: number;
  sample_types: string[];
  samples?: number;
  bytes?: number;
  rule_id?: string;
  revision?: number;
  reason?: string;
}

export interface Ledger {
  ticks?: number;
  taken?: number;
  delivered?: number;
  pending?: number;
  /** Missing without a reason; negative if samples were counted twice. */
  unaccounted?: number;
  lost?: Record<string, number>;
}

export interface RuleError {
  rule_id?: string;
  field?: string;
  reason: string;
}

export interface Rollout {
  node?: string;
  revision?: number;
  state: string;
  errors?: RuleError[];
  since_ms?: number;
  took_ms?: number;
}

export interface FleetNode {
  name: string;
  connected?: boolean;
  since_ms?: number;
  last_seen_ms?: number;
  started_at_ms?: number;
  version?: string;
  kernel?: string;
  arch?: string;
  cpus?: number;
  features?: string[];
  active_revision?: number;
  degraded?: string[];
  rss_bytes?: number;
  cpu_seconds?: number;
  spool_bytes?: number;
  processes_armed?: number;
  ledger?: Ledger;
  rules?: {
    rule_id: string;
    state: string;
    reason?: string;
    processes?: number;
    samples?: number;
    last_sample_ms?: number;
    expires_at_ms?: number;
  }[];
  rollout?: Rollout;
}

export interface Rule {
  id: string;
  description?: string;
  [field: string]: unknown;
}

export interface RuleScope {
  scope: string;
  etag?: string;
  revision?: number;
  changed_at_ms?: number;
  changed_by?: string;
  rules?: Rule[];
}

export interface RuleScopes {
  revision?: number;
  scopes?: RuleScope[];
}

export interface RevisionRollout {
  revision?: number;
  created_at_ms?: number;
  settled?: boolean;
  nodes?: Rollout[];
}

/** A failed request. */
export class ApiError extends Error {
  constructor(
    message: string,
    /** The HTTP status; 0 if there was no answer. */
    readonly status: number,
  ) {
    super(message);
  }
}

/** Profiles chosen by labels and by time, in Unix milliseconds. */
export interface Selection {
  query: string;
  from: number;
  until: number;
}

export type Parameters = Record<string, string | number | undefined>;

export const selectionParameters = ({ query, from, until }: Selection): Parameters => ({
  query: query || undefined,
  from: Math.round(from),
  until: Math.round(until),
});

export const baseParameters = (base: Selection | undefined): Parameters =>
  base
    ? { base_query: base.query || "{}", base_from: Math.round(base.from), base_until: Math.round(base.until) }
    : {};

/** Returns the address of an API call, relative to the page so that it also works below a path. */
export function url(path: string, parameters: Parameters = {}): string {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== undefined && value !== "") search.set(name, String(value));
  }
  const text = search.toString();
  return `./api/v1/${path}${text ? `?${text}` : ""}`;
}

export const get = <T>(path: string, parameters: Parameters, signal?: AbortSignal): Promise<T> => request(url(path, parameters), signal);

/** Returns the names of labels in a selection. */
export const labelNames = async (of: Selection, signal: AbortSignal): Promise<string[]> => (await get<{ names?: string[] }>("labels", selectionParameters(of), signal)).names ?? [];

/** Returns the values of a label in a selection; none without a name. */
export const labelValues = async (name: string, of: Selection, signal: AbortSignal): Promise<string[]> =>
  name === "" ? [] : ((await get<{ values?: string[] }>(`labels/${encodeURIComponent(name)}/values`, selectionParameters(of), signal)).values ?? []);

/** Requests an address of the API. */
export async function request<T>(address: string, signal?: AbortSignal): Promise<T> {
  let response: Response;
  try {
    response = await fetch(address, { signal: signal ?? null, headers: { accept: "application/json" } });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The collector does not answer. Is it running, and is the port-forward still active?", 0);
  }
  const body = await response.text();
  let answer: unknown;
  try {
    answer = JSON.parse(body);
  } catch {
    if (signal?.aborted) throw signal.reason;
    throw new ApiError(
      response.ok
        ? "The answer of the collector is not JSON. Does another program listen at this address?"
        : `The collector answered ${response.status} ${response.statusText}: ${body.slice(0, 200)}`,
      response.status,
    );
  }
  if (!response.ok) {
    const message = (answer as { error?: unknown }).error;
    throw new ApiError(typeof message === "string" ? message : `The collector answered ${response.status}.`, response.status);
  }
  return answer as T;
}
