/** The list of stored profiles, each with its download. */
import { useEffect, useState } from "preact/hooks";
import { type ProfileInfo, type Selection, get, selectionParameters, url } from "../api";
import { useLoad } from "../parts/hooks";
import { Problem } from "../parts/parts";
import { spanParameters } from "../spans";
import { bytes, duration, integer, typeName, when } from "../units";

interface Page {
  profiles?: ProfileInfo[];
  next_page_token?: string;
}

/** The labels of a profile, without the service, which has its own column. */
function Labels({ labels }: { labels: Record<string, string> }) {
  return (
    <span class="labels">
      {Object.entries(labels)
        .filter(([name]) => name !== "service_name")
        .map(([name, value]) => (
          <span class="label-pair" key={name}>
            <span>{name}</span>
            {value}
          </span>
        ))}
    </span>
  );
}

export function List(props: { selection: Selection; spans: string; tick: number; onShow: (profile: ProfileInfo) => void }) {
  const { selection, tick } = props;
  const spans = spanParameters(props.spans);
  const key = JSON.stringify([selection, spans, tick]);
  const [tokens, setTokens] = useState<string[]>([]);
  const [older, setOlder] = useState<ProfileInfo[]>([]);
  useEffect(() => {
    setTokens([]);
    setOlder([]);
  }, [JSON.stringify([selection, spans])]);
  const token = tokens[tokens.length - 1] ?? "";
  const page = useLoad<Page>(`${key} ${token}`, (signal) =>
    get("profiles", { ...selectionParameters(selection), ...spans, limit: 100, page_token: token }, signal),
  );
  if (page.error) return <Problem error={page.error} />;
  const rows = [...older, ...(page.data?.profiles ?? [])];
  const next = page.data?.next_page_token;
  return (
    <div class="table-box" tabIndex={0} role="region" aria-label="Stored profiles">
      <table class="list">
        <thead>
          <tr>
            <th scope="col">Start</th>
            <th scope="col">Service</th>
            <th scope="col">Labels</th>
            <th scope="col">Reason</th>
            <th scope="col" class="number">Length</th>
            <th scope="col" class="number">Samples</th>
            <th scope="col" class="number">Size</th>
            <th scope="col"><span class="visually-hidden">What to do</span></th>
          </tr>
        </thead>
        <tbody>
          {rows.map((profile) => (
            <tr key={profile.id}>
              <td class="nowrap">{when(profile.start_ms)}</td>
              <th scope="row">{profile.labels["service_name"] ?? "—"}</th>
              <td><Labels labels={profile.labels} /></td>
              <td>
                {profile.rule_id ? <>rule <b>{profile.rule_id}</b></> : <span class="dim">no rule</span>}
                {profile.revision ? <span class="dim"> · revision {profile.revision}</span> : null}
                {profile.reason && <div class="dim">{profile.reason}</div>}
                <div class="dim">{profile.sample_types.map(typeName).join(", ")}</div>
              </td>
              <td class="number">{duration(profile.duration_ms)}</td>
              <td class="number">{integer(profile.samples ?? 0)}</td>
              <td class="number">{bytes(profile.bytes ?? 0)}</td>
              <td class="number nowrap">
                <button type="button" class="quiet" onClick={() => props.onShow(profile)} aria-label={`Show only profile ${profile.id}`}>Show</button>{" "}
                <a class="quiet button" href={url(`profiles/${encodeURIComponent(profile.id)}`, spans)} download aria-label={`Download profile ${profile.id} as pprof`}>pprof</a>
              </td>
            </tr>
          ))}
        </tbody>
      </table>
      {rows.length === 0 && !page.loading && <p class="dim none">{next ? "None of the newest profiles has such a sample." : props.spans === "" ? "No profiles." : "No profile has such a sample."}</p>}
      {next && (
        <button
          type="button"
          class="quiet more"
          onClick={() => {
            setOlder(rows);
            setTokens([...tokens, next]);
          }}
        >
          Show older profiles
        </button>
      )}
    </div>
  );
}
