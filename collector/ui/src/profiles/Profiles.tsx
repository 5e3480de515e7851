/** The main view: which profiles, over which time, compared with what; and what they say. */
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import {
  type FlameGraph,
  type Selection,
  type Series,
  type Timeline as TimelineAnswer,
  type Top,
  type ApiError,
  baseParameters,
  get,
  selectionParameters,
  url,
} from "../api";
import { Welcome } from "../Empty";
import { Flame } from "../flame/Flame";
import { changeColour, frames, groupColour, matcher } from "../flame/frames";
import { List } from "./List";
import { Choice, Combobox, Popover, Problem, Toggle, useLoad } from "../parts";
import { format, parse, pinned, replace } from "./selector";
import { type Span, type State, go } from "../state";
import { Table } from "./Table";
import { PRESETS, SHIFTS, isRelative, niceStep, resolve, toLocalInput } from "../time";
import { Timeline } from "./Timeline";
import { clock, day, integer, share, typeName, value, when } from "../units";

const MAX_NODES = 20_000;
const TOP_ROWS = 2000;

/** Everything by which the former frames lose their place. */
const MOVED: Partial<State> = { span: undefined, bspan: undefined, profile: "" };

function RangePicker({ state, from, until }: { state: State; from: number; until: number }) {
  const [low, setLow] = useState("");
  const [high, setHigh] = useState("");
  const preset = PRESETS.find(([relative]) => relative === state.from && state.until === "now");
  const name = preset ? preset[1] : isRelative(state.from) ? `${state.from} to ${state.until}` : `${when(from)} – ${day(from) === day(until) ? clock(until) : when(until)}`;
  const [start, end] = [Date.parse(low || toLocalInput(from)), Date.parse(high || toLocalInput(until))];
  return (
    <div class="range">
      <span class="label" aria-hidden="true">Time</span>
      <Popover name={`Time range: ${name}`} label={name}>
        {(close) => (
          <div class="range-box">
            <ul class="presets">
              {PRESETS.map(([relative, title]) => (
                <li key={relative}>
                  <button type="button" aria-pressed={preset?.[0] === relative} onClick={() => { go({ ...MOVED, from: relative, until: "now" }); close(); }}>
                    {title}
                  </button>
                </li>
              ))}
            </ul>
            <form
              onSubmit={(event) => {
                event.preventDefault();
                if (!(start < end)) return;
                go({ ...MOVED, from: String(start), until: String(end), live: false });
                close();
              }}
            >
              <label>
                <span>From</span>
                <input class="field" type="datetime-local" step="1" value={low || toLocalInput(from)} onInput={(event) => setLow(event.currentTarget.value)} />
              </label>
              <label>
                <span>Until</span>
                <input class="field" type="datetime-local" step="1" value={high || toLocalInput(until)} onInput={(event) => setHigh(event.currentTarget.value)} />
              </label>
              {!(start < end) && <p class="bad" role="alert">The range must end after it begins.</p>}
              <button type="submit" class="primary">Show this range</button>
            </form>
          </div>
        )}
      </Popover>
    </div>
  );
}

function AddFilter(props: { window: Selection; onAdd: (name: string, op: "=" | "!=" | "=~", value: string) => void }) {
  const [name, setName] = useState("");
  const [op, setOp] = useState<"=" | "!=" | "=~">("=");
  const parameters = selectionParameters(props.window);
  return (
    <Popover class="add" name="Add a filter by label" label={<span><span aria-hidden="true">+ </span>Label</span>}>
      {(close) => (
        <div class="add-box">
          <Combobox label="Label" value={name} onChoose={setName} load={async (signal) => (await get<{ names?: string[] }>("labels", parameters, signal)).names ?? []} />
          <div class="ops">
            <Choice name="Relation" value={op} of={[["=", "is"], ["!=", "is not"], ["=~", "matches"]]} onChange={setOp} />
          </div>
          <Combobox
            key={name}
            label="Value"
            value=""
            placeholder={name === "" ? "choose a label first" : op === "=~" ? "a pattern: checkout-.*" : ""}
            onChoose={(chosen) => {
              if (name === "" || chosen === "") return;
              props.onAdd(name, op, chosen);
              close();
            }}
            load={async (signal) =>
              name === "" ? [] : (await get<{ values?: string[] }>(`labels/${encodeURIComponent(name)}/values`, parameters, signal)).values ?? []
            }
          />
        </div>
      )}
    </Popover>
  );
}

/** Service, labels and the selector itself, all of them the same text. */
function SelectorBar(props: { name: string; query: string; window: Selection; error: ApiError | undefined; onQuery: (query: string) => void }) {
  const { query, error, onQuery } = props;
  const [text, setText] = useState(query);
  useEffect(() => setText(query), [query]);
  const matchers = parse(query);
  const service = pinned(matchers, "service_name");
  const id = `selector-${props.name.replace(/\W/g, "")}`;
  return (
    <>
      <Combobox
        label={`${props.name}service`.replace(/^\w/, (letter) => letter.toUpperCase())}
        value={service}
        placeholder="All services"
        none="All services"
        load={async (signal) =>
          (await get<{ values?: string[] }>("labels/service_name/values", { from: props.window.from, until: props.window.until }, signal)).values ?? []
        }
        onChoose={(chosen) =>
          onQuery(
            chosen === ""
              ? format((matchers ?? []).filter(({ name }) => name !== "service_name"))
              : format(replace(matchers ?? [], { name: "service_name", op: "=", value: chosen })),
          )
        }
      />
      <form
        class="selector"
        onSubmit={(event) => {
          event.preventDefault();
          onQuery(text.trim());
        }}
      >
        <label class="label" for={id}>Selector</label>
        <input
          id={id}
          class="field mono"
          type="text"
          spellcheck={false}
          autocomplete="off"
          autocapitalize="off"
          placeholder={'{service_name="checkout",pod=~"checkout-.*"}'}
          value={text}
          aria-invalid={error !== undefined}
          aria-describedby={error ? `${id}-error` : undefined}
          onInput={(event) => setText(event.currentTarget.value)}
          onBlur={() => text.trim() !== query && onQuery(text.trim())}
        />
        {error && <p class="bad" id={`${id}-error`} role="alert">{error.message}</p>}
      </form>
      <AddFilter window={{ ...props.window, query: matchers ? query : "" }} onAdd={(name, op, value) => onQuery(format(replace(matchers ?? [], { name, op, value })))} />
    </>
  );
}

function Nothing(props: { state: State; selection: Selection; isSpan: boolean }) {
  const { state, selection } = props;
  // Is there anything at all, and where?
  const all = useLoad<{ series?: Series[] }>("all", (signal) => get("series", { from: 0, until: Date.now() + 3600e3 }, signal));
  const here = useLoad<{ series?: Series[] }>(`here ${selection.query}`, (signal) =>
    get("series", { query: selection.query, from: 0, until: Date.now() + 3600e3 }, signal),
  );
  if (all.loading || here.loading) return <p class="dim none">Looking…</p>;
  if (all.data && (all.data.series ?? []).length === 0) return <Welcome />;
  const newest = Math.max(0, ...(here.data?.series ?? []).map((series) => series.last_ms));
  return (
    <section class="empty">
      <h2>Nothing in this selection</h2>
      <p>
        No profile {selection.query ? <>of <code>{selection.query}</code></> : null} starts between {when(selection.from)} and {when(selection.until)}
        {state.type && <> with values of {typeName(state.type)}</>}.
        {newest > 0 ? <> The newest one started at {when(newest)}.</> : selection.query ? " None does at any other time." : ""}
      </p>
      <p class="actions">
        {props.isSpan && <button type="button" onClick={() => go({ span: undefined, bspan: undefined })}>Show the whole window</button>}
        {newest > 0 && (newest < selection.from || newest >= selection.until) && (
          <button type="button" onClick={() => go({ ...MOVED, from: String(newest - 1800e3), until: String(newest + 300e3) })}>Go to the newest</button>
        )}
        {selection.query && <button type="button" onClick={() => go({ ...MOVED, q: "" })}>Show all services</button>}
        {state.profile && <button type="button" onClick={() => go({ profile: "" })}>Show all profiles</button>}
        {state.type && <button type="button" onClick={() => go({ type: "" })}>Show another type</button>}
      </p>
    </section>
  );
}

export function Profiles({ state, tick, dark }: { state: State; tick: number; dark: boolean }) {
  // One `now` for everything that is asked at once.
  const [from, until, badTime] = useMemo(() => {
    const now = Date.now();
    const [low, high] = [resolve(state.from, now), resolve(state.until, now)];
    if (low === undefined || high === undefined || low >= high) return [now - 3600e3, now, true] as const;
    return [low, high, false] as const;
  }, [state.from, state.until, tick]);

  const window: Selection = { query: state.q, from, until };
  const half = from + Math.floor((until - from) / 2);
  // Two selections of one series start as the two halves of the window; of two series, as the whole of it.
  const sameSeries = state.bq === undefined && state.shift === 0;
  const baseWindow: Selection = { query: state.bq ?? state.q, from: from - state.shift, until: until - state.shift };
  const span: Span | undefined = state.span ?? (state.compare && sameSeries ? [half, until] : undefined);
  const bspan: Span | undefined = state.bspan ?? (sameSeries ? [from, half] : undefined);
  const selection: Selection = span ? { query: state.q, from: span[0], until: span[1] } : window;
  const base: Selection | undefined = state.compare ? (bspan ? { ...baseWindow, from: bspan[0], until: bspan[1] } : baseWindow) : undefined;

  const series = useLoad<{ series?: Series[] }>(JSON.stringify(["series", window]), (signal) => get("series", selectionParameters(window), signal));
  const types = useMemo(() => {
    const all = new Set((series.data?.series ?? []).flatMap((entry) => entry.sample_types));
    const rank = ["cpu/nanoseconds", "samples/count", "offcpu/nanoseconds", "events/count"];
    return [...all].sort((a, b) => (rank.indexOf(a) + 99) % 99 - (rank.indexOf(b) + 99) % 99 || a.localeCompare(b));
  }, [series.data]);
  const type = state.type || types[0] || "";
  // Until the types are known the collector would have to guess, and its guess may be another than ours.
  const ready = state.type !== "" || series.data !== undefined;

  const lineKey = (which: Selection) => (ready ? JSON.stringify(["timeline", which, type]) : undefined);
  const loadLine = (which: Selection) => (signal: AbortSignal) =>
    get<TimelineAnswer>("timeline", { ...selectionParameters(which), type, step_ms: niceStep(which.until - which.from) }, signal);
  const line = useLoad<TimelineAnswer>(lineKey(window), loadLine(window));
  const baseLine = useLoad<TimelineAnswer>(state.compare ? lineKey(baseWindow) : undefined, loadLine(baseWindow));

  const asked = { ...selectionParameters(selection), ...baseParameters(base), profile_id: state.profile, type };
  const key = ready ? JSON.stringify(asked) : undefined;
  const wantsGraph = state.show === "graph" || state.show === "both";
  const wantsTable = state.show === "table" || state.show === "both";
  const graph = useLoad<FlameGraph>(key && `graph ${key}`, (signal) => get("flamegraph", { ...asked, max_nodes: MAX_NODES }, signal));
  const top = useLoad<Top>(wantsTable && key ? `top ${key}` : undefined, (signal) => get("top", { ...asked, limit: TOP_ROWS }, signal));

  const drawn = useMemo(() => (graph.data ? frames(graph.data, state.colour, state.absolute) : undefined), [graph.data, state.colour, state.absolute]);
  const diff = state.compare && graph.data?.base_total !== undefined;
  const pattern = useMemo(() => matcher(state.search), [state.search]);

  const unit = graph.data?.unit ?? "";
  const total = graph.data?.total ?? 0;
  const baseTotal = graph.data?.base_total ?? 0;
  const isEmpty = graph.data !== undefined && total === 0 && baseTotal === 0;
  const queryError = [series.error, graph.error].find((error) => error?.status === 400 && !badTime);
  const failure = badTime ? undefined : graph.error && graph.error !== queryError ? graph.error : line.error !== queryError ? line.error : undefined;
  const baseFault = queryError && /base/.test(queryError.message) && state.compare;

  const search = useRef<HTMLInputElement>(null);
  const [typed, setTyped] = useState(state.search);
  useEffect(() => setTyped(state.search), [state.search]);
  useEffect(() => {
    if (typed === state.search) return;
    const timer = setTimeout(() => go({ search: typed }, true), 150);
    return () => clearTimeout(timer);
  }, [typed]);
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      const target = event.target instanceof HTMLElement ? event.target : undefined;
      if (event.key !== "/" || event.ctrlKey || event.metaKey || target?.closest("input, select, textarea")) return;
      event.preventDefault();
      search.current?.focus();
      search.current?.select();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);

  const focusFunction = (name: string) => go({ search: `"${name}"`, zoom: "", show: state.show === "table" ? "both" : state.show });
  const download = url("merge", { ...selectionParameters(selection), type });
  const busy = graph.loading || line.loading || series.loading;

  return (
    <main class="profiles">
      <h1 class="visually-hidden">Profiles</h1>
      <section class="controls" aria-label="Which profiles">
        <SelectorBar name="" query={state.q} window={window} error={baseFault ? undefined : queryError} onQuery={(q) => go({ q, profile: "", zoom: "" })} />
        <label class="type">
          <span class="label">Value</span>
          <select class="field" value={type} onChange={(event) => go({ type: event.currentTarget.value, zoom: "" })}>
            {type === "" && <option value="">—</option>}
            {[...new Set([...types, ...(type ? [type] : [])])].map((entry) => (
              <option key={entry} value={entry}>{typeName(entry)}</option>
            ))}
          </select>
        </label>
        <RangePicker state={state} from={from} until={until} />
        <button type="button" class={`field compare${state.compare ? " on" : ""}`} aria-pressed={state.compare} onClick={() => go({ compare: !state.compare, bspan: undefined, bq: undefined, shift: 0, span: undefined, profile: "", zoom: "" })}>
          Compare
        </button>
      </section>

      {state.compare && (
        <section class="controls base" aria-label="What to compare with">
          <SelectorBar name="base " query={state.bq ?? state.q} window={baseWindow} error={baseFault ? queryError : undefined} onQuery={(bq) => go({ bq: bq === state.q ? undefined : bq, zoom: "" })} />
          <label class="type">
            <span class="label">Base time</span>
            <select class="field" value={String(state.shift)} onChange={(event) => go({ shift: Number(event.currentTarget.value), bspan: undefined })}>
              {[...SHIFTS, ...(SHIFTS.some(([ms]) => ms === state.shift) ? [] : [[state.shift, `${value(state.shift * 1e6, "nanoseconds")} earlier`] as const])].map(([ms, name]) => (
                <option key={ms} value={String(ms)}>{name}</option>
              ))}
            </select>
          </label>
        </section>
      )}
      {badTime && <div class="problem" role="alert"><strong>The time range is not one</strong><span>“{state.from}” to “{state.until}”: give now, now-15m, milliseconds or a date, and let it end after it begins.</span></div>}

      <section class="lines" aria-label="Over time">
        {state.compare && (
          <div class="line">
            <h2><i class="swatch base" /> Base <span class="dim">{when(base?.from ?? from)} – {when(base?.until ?? until)}</span></h2>
            <Timeline name="The base's value" side="base" answer={baseLine.data} from={baseWindow.from} until={baseWindow.until} span={bspan} onSpan={(picked) => go({ bspan: picked, span: state.span ?? span })} />
          </div>
        )}
        <div class="line">
          {state.compare && <h2><i class="swatch main" /> Comparison <span class="dim">{when(selection.from)} – {when(selection.until)}</span></h2>}
          <Timeline name="The value" side="main" answer={line.data} from={from} until={until} span={span} onSpan={(picked) => go({ span: picked, profile: "", ...(state.compare ? { bspan: state.bspan ?? bspan } : {}) })} />
        </div>
      </section>

      <section class="results" aria-label="What they say" aria-busy={busy}>
        {!queryError && !(isEmpty && state.show !== "list") && <div class="toolbar">
          <div class="numbers">
            {diff ? (
              <>
                <span class="big">{value(total, unit)}</span>
                <span class="dim"> against {value(baseTotal, unit)} · {integer(graph.data?.profiles ?? 0)} and {integer(graph.data?.base_profiles ?? 0)} profiles</span>
              </>
            ) : (
              graph.data && (
                <>
                  <span class="big">{value(total, unit)}</span>{" "}
                  <span class="dim">{typeName(graph.data.sample_type)} · {integer(graph.data.profiles ?? 0)} {graph.data.profiles === 1 ? "profile" : "profiles"}</span>
                </>
              )
            )}
            {busy && <span class="spinner" aria-label="Loading" role="status" />}
            {state.span && !state.compare && (
              <span class="chip">
                {when(state.span[0])} – {clock(state.span[1])}
                <button type="button" onClick={() => go({ from: String(state.span?.[0]), until: String(state.span?.[1]), span: undefined, live: false })}>Zoom in</button>
                <button type="button" aria-label="Clear the picked range" onClick={() => go({ span: undefined })}>✕</button>
              </span>
            )}
            {state.profile && (
              <span class="chip">
                only profile <code>{state.profile}</code>
                <button type="button" aria-label="Show all profiles again" onClick={() => go({ profile: "" })}>✕</button>
              </span>
            )}
          </div>
          <div class="tools">
            <div class="search">
              <input
                ref={search}
                class="field"
                type="search"
                aria-label="Search functions: part of a name, a whole name in quotes, or a /pattern/"
                placeholder="Search functions"
                title={'Part of a name, "a whole name", or /a pattern/'}
                spellcheck={false}
                value={typed}
                onInput={(event) => setTyped(event.currentTarget.value)}
                onKeyDown={(event) => {
                  if (event.key === "Escape") {
                    event.preventDefault();
                    setTyped("");
                  } else if (event.key === "Enter") {
                    go({ search: typed }, true);
                    document.querySelector<HTMLElement>(".flame-graph")?.focus();
                  }
                }}
              />
              <kbd aria-hidden="true">/</kbd>
            </div>
            <Choice name="How to show it" value={state.show} of={[["graph", "Graph"], ["both", "Both"], ["table", "Table"], ["list", "Profiles"]]} onChange={(show) => go({ show })} />
            {wantsGraph && (
              <Popover class="options-button" name="Options of the graph" label="Options">
                {() => (
                  <div class="options-box">
                    <span class="label">Colour by</span>
                    <Choice name="Colour by" value={state.colour} of={[["package", "Package"], ["binary", "Binary"], ["kind", "Kind"]]} onChange={(colour) => go({ colour }, true)} />
                    <Toggle name="Root at the bottom" on={state.flip} onChange={(flip) => go({ flip }, true)} />
                    <Toggle name="Orange and blue differences" title="For eyes that do not tell red from green" on={state.blind} onChange={(blind) => go({ blind }, true)} />
                    <Toggle name="Compare amounts, not shares" on={state.absolute} onChange={(absolute) => go({ absolute }, true)} />
                  </div>
                )}
              </Popover>
            )}
            {state.profile ? (
              <a class="field button" href={url(`profiles/${encodeURIComponent(state.profile)}`)} download>Download pprof</a>
            ) : isEmpty || !graph.data ? (
              <button type="button" class="field" disabled>Download pprof</button>
            ) : base ? (
              <Popover name="Download pprof" label="Download pprof">
                {() => (
                  <div class="options-box">
                    <a class="field button" href={download} download>Comparison</a>
                    <a class="field button" href={url("merge", { ...selectionParameters(base), type })} download>Base</a>
                  </div>
                )}
              </Popover>
            ) : (
              <a class="field button" href={download} download>Download pprof</a>
            )}
          </div>
        </div>}

        {failure && <Problem error={failure} />}
        {queryError && <p class="dim none">Correct the selector to see profiles.</p>}
        {!failure && !queryError && !badTime && state.show !== "list" && isEmpty && <Nothing state={state} selection={selection} isSpan={state.span !== undefined} />}
        {state.show === "list" && !queryError && <List selection={selection} tick={tick} onShow={({ id, sample_types }) =>
          // A profile of another kind than the one on show has to be shown as what it is.
          go({ profile: id, type: sample_types.includes(type) ? type : (sample_types.at(-1) ?? ""), show: "graph", compare: false, zoom: "" })
        } />}
        {state.show !== "list" && !isEmpty && !queryError && drawn && (
          <>
            {wantsGraph && (
              <div class="legend">
                {diff ? (
                  <>
                    <span>less than the base</span>
                    <span class="ramp" role="img" aria-label="From less, through the same, to more">
                      {[-0.4, -0.2, -0.08, -0.02, 0, 0.02, 0.08, 0.2, 0.4].map((delta) => (
                        <i key={delta} style={{ background: changeColour(delta, dark, state.blind) }} />
                      ))}
                    </span>
                    <span>more than the base</span>
                    <span class="dim">· widths are both together{state.absolute ? "" : ", as shares of their totals"}</span>
                  </>
                ) : (
                  drawn.groups.filter((group) => group.self > 0).slice(0, 8).map((group) => (
                    <span key={group.name} title={`${share(group.self, total)} self`}>
                      <i style={{ background: groupColour(drawn.hues, group.name, dark) }} /> {group.name} <span class="dim">{share(group.self, total)}</span>
                    </span>
                  ))
                )}
              </div>
            )}
            <div class={`panes ${state.show}`}>
              {wantsTable && (top.data ? (
                <Table top={top.data} diff={diff} blind={state.blind} search={state.search} matches={pattern.test} onFocus={focusFunction} />
              ) : top.error ? <Problem error={top.error} /> : <p class="dim none">Loading…</p>)}
              {wantsGraph && (
                <Flame
                  frames={drawn}
                  diff={diff}
                  dark={dark}
                  blind={state.blind}
                  flip={state.flip}
                  search={state.search}
                  zoom={state.zoom}
                  onZoom={(zoom) => go({ zoom })}
                  onClear={() => go({ search: "" }, true)}
                />
              )}
            </div>
          </>
        )}
      </section>
    </main>
  );
}
