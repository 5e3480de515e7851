import type { ComponentChildren } from "preact";
import { useId, useLayoutEffect, useRef, useState } from "preact/hooks";

/** A button that opens a box below it; closes by Escape, by a click elsewhere, and when the focus leaves. */
export function Popover(props: {
  label: ComponentChildren;
  name: string;
  class?: string;
  children: (close: () => void) => ComponentChildren;
}) {
  const [open, set] = useState(false);
  const box = useRef<HTMLDivElement>(null);
  const button = useRef<HTMLButtonElement>(null);
  const id = useId();
  const close = () => {
    set(false);
    button.current?.focus();
  };
  // Before the next key arrives: somebody who types ahead means the box.
  useLayoutEffect(() => {
    if (!open) return;
    box.current?.querySelector<HTMLElement>(".popover input, .popover button, .popover select")?.focus();
    const outside = (event: Event) => {
      if (event.target instanceof Node && !box.current?.contains(event.target)) set(false);
    };
    document.addEventListener("pointerdown", outside);
    document.addEventListener("focusin", outside);
    return () => {
      document.removeEventListener("pointerdown", outside);
      document.removeEventListener("focusin", outside);
    };
  }, [open]);
  return (
    <div
      class={`popover-host ${props.class ?? ""}`}
      ref={box}
      onKeyDown={(event) => {
        if (event.key !== "Escape" || !open || event.defaultPrevented) return;
        event.stopPropagation();
        close();
      }}
    >
      <button type="button" class="field" ref={button} aria-haspopup="dialog" aria-expanded={open} aria-controls={open ? id : undefined} aria-label={props.name} onClick={() => set(!open)}>
        {props.label}
        <span class="caret" aria-hidden="true" />
      </button>
      {open && (
        // Takes the focus of a click beside its controls, which would otherwise count as leaving it.
        <div class="popover" id={id} role="dialog" aria-label={props.name} tabIndex={-1}>
          {props.children(close)}
        </div>
      )}
    </div>
  );
}
