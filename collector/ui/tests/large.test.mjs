// Tests of graphs with 100,000 frames: what one animation frame draws, and that input is handled in between. They assert no times.
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { accessible, withPage } from "./page.mjs";

/** Frames that one animation frame draws at most, and that are drawn in all. */
const [OF_PAINT, DRAWN] = [1000, 8000];

/** 20 functions with 400 callees with 8,000 callees, which have 91,579 leaves. With the root, these are 100,000 frames. */
const tree = () =>
  Array.from({ length: 91_579 }, (_, at) => `a${at % 20};b${at % 400};c${at % 8000};leaf${(at % 8000) % 97}_${Math.floor(at / 8000)} ${1 + (at % 7)}`).join("\n");

/** 999 stacks of 100 frames beside each other, each wide enough to see. */
const forest = () => Array.from({ length: 999 }, (_, at) => `${Array.from({ length: 100 }, (_, depth) => `s${at}_${depth % 9}_${depth}`).join(";")} 5`).join("\n");

async function push(collector, name, body) {
  const now = Math.floor(Date.now() / 1000);
  const answer = await fetch(`${collector.address}ingest?name=${name}&from=${now - 60}&until=${now - 50}&format=folded&units=samples`, { method: "POST", body });
  assert.equal(answer.status, 200, await answer.text());
}

const { on } = withPage(async ({ collector }) => {
  await push(collector, "tree", tree());
  await push(collector, "forest", forest());
});

/** Counts the frames that each animation frame adds, and the keys that arrive while a graph is being drawn. Lists the requests of the page itself. */
function observe() {
  const seen = { paints: [0], busyKeys: 0, busy: 0, requests: [] };
  const own = fetch;
  globalThis.fetch = (address, ...more) => {
    seen.requests.push(String(address));
    return own(address, ...more);
  };
  globalThis.seen = seen;
  const next = () => {
    seen.paints.push(0);
    if (document.querySelector(".flame-graph")?.getAttribute("aria-busy") === "true") seen.busy += 1;
    requestAnimationFrame(next);
  };
  requestAnimationFrame(next);
  addEventListener("keydown", () => (seen.busyKeys += Number(document.querySelector(".flame-graph")?.getAttribute("aria-busy") === "true")));
  new MutationObserver((records) => {
    for (const record of records) for (const node of record.addedNodes) if (node.nodeName === "g" && record.target.classList?.contains("frames")) seen.paints[seen.paints.length - 1] += 1;
  }).observe(document, { childList: true, subtree: true });
}

const open = (name) => `./?q=${encodeURIComponent(`{service_name="${name}"}`)}`;

/** Opens the graph of a pushed profile, and presses keys until it is complete. */
async function drawn(page, name, frames) {
  await page.addInitScript(observe);
  await page.goto(new URL(open(name), page.url()).href);
  // One key is always on its way, so that the browser can handle it as soon as the page lets it.
  let complete = false;
  const pressing = (async () => {
    while (!complete) await page.keyboard.press("Shift");
  })();
  await page.waitForSelector(".flame-graph[aria-busy=false]").finally(() => (complete = true));
  await pressing;
  assert.match(await page.getAttribute(".flame-graph", "aria-label"), new RegExp(`^Flame graph of ${frames} frames`));
  return page.evaluate(() => ({ ...globalThis.seen, drawn: document.querySelectorAll("g.frame").length }));
}

describe("a graph of 100,000 frames", () => {
  it("is drawn in parts, between which keys are handled", async () => {
    await on("nodes", async (page) => {
      const { paints, busyKeys, busy, drawn: count } = await drawn(page, "forest", 99_901);
      const most = Math.max(...paints);
      assert.ok(most > 0 && most <= OF_PAINT, `one animation frame draws ${most} frames`);
      assert.ok(count > OF_PAINT * 5 && count <= DRAWN + OF_PAINT, `${count} frames are drawn`);
      assert.ok(busy >= 5, `${busy} animation frames while the graph was drawn`);
      assert.ok(busyKeys > 0, "no key arrived while the graph was drawn");
      assert.match(await page.textContent(".found"), /of 99,901 frames are wide enough to see/);
    });
  });

  it("draws only what is wide enough, and a zoom shows the rest", async () => {
    await on("nodes", async (page) => {
      const { paints, drawn: count } = await drawn(page, "tree", 100_000);
      assert.ok(Math.max(...paints) <= OF_PAINT);
      // 20 and 400 functions and the root are visible; the 8,000 and their leaves are narrower than a pixel.
      assert.equal(count, 421);
      await page.locator("g.frame").filter({ hasText: /^a3$/ }).click();
      await page.waitForFunction(() => document.querySelectorAll("g.frame").length === 1 + 1 + 20 + 400);
    });
  });

  it("does not parse the answer where the page handles input", async () => {
    await on("nodes", async (page) => {
      const { requests } = await drawn(page, "tree", 100_000);
      assert.ok(requests.some((name) => name.includes("/timeline?")));
      assert.deepEqual(requests.filter((name) => name.includes("/flamegraph?")), []);
    });
  });

  it("can be searched, filtered and turned into a sandwich", async () => {
    await on("nodes", async (page) => {
      await drawn(page, "tree", 100_000);
      await page.keyboard.press("/");
      // A whole name: leaf7_10 and leaf7_11 do not match.
      await page.keyboard.type('"leaf7_1"');
      // Of the 8,000 callers of leaves, those whose number leaves 7 when divided by 97.
      await page.waitForFunction(() => document.querySelector(".found")?.textContent.startsWith("83 frames"));
      await page.keyboard.press("Escape");
      await page.goto(`${page.url()}&only=${encodeURIComponent("^leaf7_")}&show=sandwich&function=leaf7_3`);
      await page.waitForSelector(".flame.callers g.frame");
      const callers = await page.getAttribute(".flame.callers .flame-graph", "aria-label");
      // The function, and for each of its 83 stacks a c, a b and an a, some of them shared.
      const expected = new Set(["leaf"]);
      for (let c = 7; c < 8000; c += 97) for (const path of [`${c}`, `${c}/${c % 400}`, `${c}/${c % 400}/${c % 20}`]) expected.add(path);
      assert.match(callers, new RegExp(`^Flame graph of ${expected.size} callers`));
      await accessible(page);
    });
  });
});
