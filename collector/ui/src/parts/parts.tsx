/** Small components that several views use. */
import { useState } from "preact/hooks";
import type { ApiError } from "../api";

export function Problem({ error }: { error: ApiError }) {
  return (
    <div class="problem" role="alert">
      <strong>{error.status === 0 ? "No connection" : "The request failed"}</strong>
      <span>{error.message}</span>
    </div>
  );
}

export function Command({ text }: { text: string }) {
  const [done, set] = useState(false);
  return (
    <div class="command">
      <pre tabIndex={0}><code>{text}</code></pre>
      <button
        type="button"
        class="quiet"
        aria-label="Copy the command"
        onClick={() => void navigator.clipboard?.writeText(text).then(() => {
          set(true);
          setTimeout(() => set(false), 1500);
        })}
      >
        {done ? "Copied" : "Copy"}
      </button>
    </div>
  );
}

/** A row of buttons, one of which is pressed. */
export function Choice<T extends string>(props: { name: string; value: T; of: [T, string][]; onChange: (value: T) => void }) {
  return (
    <div class="choice" role="group" aria-label={props.name}>
      {props.of.map(([value, name]) => (
        <button key={value} type="button" aria-pressed={value === props.value} onClick={() => props.onChange(value)}>
          {name}
        </button>
      ))}
    </div>
  );
}

export function Toggle(props: { name: string; on: boolean; onChange: (on: boolean) => void; title?: string }) {
  return (
    <label class="toggle" title={props.title}>
      <input type="checkbox" role="switch" checked={props.on} onChange={(event) => props.onChange(event.currentTarget.checked)} />
      <span class="switch" aria-hidden="true" />
      <span>{props.name}</span>
    </label>
  );
}
