// Shared code of the tests: opens views of a filled collector, and reads the drawn frames.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { after, before } from "node:test";
import { openPage, seed, startBrowser, startCollector } from "./collector.mjs";

const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

export const CHECKOUT = `q=${encodeURIComponent('{service_name="checkout"}')}&type=cpu%2Fnanoseconds`;

/** Starts a browser and a filled collector around the tests of a file. `prepare` runs before the tests. */
export function withPage(prepare = async () => {}) {
  const tested = {};
  before(async () => {
    tested.browser = await startBrowser();
    tested.collector = await startCollector();
    tested.agents = await seed(tested.collector);
    await prepare(tested);
  });
  after(async () => {
    await tested.browser?.close();
    await tested.agents?.stop();
    await tested.collector?.stop();
  });
  /** Opens a view, runs a test on it, and then checks that it had no errors and no requests to other origins. */
  const on = async (path, run, options) => {
    const opened = await openPage(tested.browser, tested.collector.address + path, options);
    try {
      await run(opened.page, opened.faults);
      assert.deepEqual(opened.faults, []);
    } finally {
      await opened.close();
    }
  };
  return { on, tested };
}

/** Returns the drawn frames with their names, widths, fills and classes. */
export const framesOf = (page) =>
  page.$$eval("g.frame", (groups) =>
    groups.map((group) => ({
      name: group.__data__.data.name,
      width: group.querySelector("rect").getBoundingClientRect().width,
      fill: group.querySelector("rect").getAttribute("fill"),
      classes: [...group.classList],
    })),
  );

export async function drawn(page, name) {
  // The component animates widths, so this waits until they are final.
  await page.waitForFunction((wanted) => {
    const frames = [...document.querySelectorAll("g.frame")];
    const whole = document.querySelector(".flame-graph svg")?.clientWidth ?? 0;
    const settled = ({ __data__: { x0, x1 }, firstChild }) => Math.abs(firstChild.getBoundingClientRect().width - (x1 - x0) * whole) < 3;
    return frames.some((group) => group.__data__.data.name === wanted) && frames.every(settled);
  }, name);
  return framesOf(page);
}

export const named = (frames, name) => {
  const found = frames.find((frame) => frame.name === name);
  assert.ok(found, `${name} is not among ${frames.map((frame) => frame.name).join(", ")}`);
  return found;
};

/** Returns the hue of `oklch(l c h)` in degrees, or nothing for grey. */
export const hueOf = (fill) => {
  const [, chroma, hue] = /oklch\([\d.]+ ([\d.]+) ([\d.]+)\)/.exec(fill).map(Number);
  return chroma < 0.02 ? undefined : hue;
};

export async function accessible(page) {
  // The content security policy of the page blocks other scripts, so this one runs through the debugger.
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  const faults = violations.map(({ id, help, nodes }) => `${id}: ${help}\n  ${nodes.map((node) => `${node.target} ${node.failureSummary}`).join("\n  ")}`);
  assert.deepEqual(faults, []);
}
