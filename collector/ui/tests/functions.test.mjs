// Tests of the views of one function: sandwich view and table, by pointer and by keys, and their links.
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { CHECKOUT, accessible, withPage } from "./page.mjs";

const { on } = withPage();

const PARSE = "serde_json::de::Deserializer<R>::parse_value";
const sandwichOf = (name) => `?${CHECKOUT}&show=sandwich&function=${encodeURIComponent(name)}`;

/** Waits for the sandwich view of a function and returns the frames of one part by row: name, part of the width, total. */
async function rowsOf(page, part, name) {
  await page.waitForFunction(
    ([part, name]) =>
      document.querySelector(".sandwich h2")?.textContent === name &&
      [...document.querySelectorAll(`.flame.${part} g.frame`)].some((group) => group.__data__.depth === 0 && group.__data__.data.name === name),
    [part, name],
  );
  const frames = await page.$$eval(`.flame.${part} g.frame`, (groups) =>
    groups.map(({ __data__: { depth, x0, x1, data: { name, total } } }) => ({ depth, name, width: x1 - x0, total })),
  );
  const rows = [];
  for (const { depth, ...frame } of frames) (rows[depth] ??= []).push(frame);
  return rows;
}

/**
 * Sums up the stacks of the flame graph of the API that contain a function, by the name of its neighbour: the caller of its
 * outermost call, or the function that this call runs. Computed stack by stack, unlike in the page.
 */
const neighbours = (page, name) =>
  page.evaluate(async (name) => {
    const until = Date.now();
    const query = encodeURIComponent('{service_name="checkout"}');
    const answer = await fetch(`./api/v1/flamegraph?query=${query}&from=${until - 3600e3}&until=${until}&type=cpu/nanoseconds`);
    const sums = { total: 0, callers: {}, callees: {} };
    const add = (of, key, amount) => (of[key] = (of[key] ?? 0) + amount);
    const walk = (node, stack) => {
      const here = [...stack, node.name];
      const at = here.indexOf(name, 1);
      if (at > 0 && node.self) {
        sums.total += node.self;
        add(sums.callers, here[at - 1], node.self);
        if (here[at + 1] !== undefined) add(sums.callees, here[at + 1], node.self);
      }
      for (const child of node.children ?? []) walk(child, here);
    };
    walk((await answer.json()).root, []);
    return sums;
  }, name);

const totals = (row) => Object.fromEntries((row ?? []).map(({ name, total }) => [name, total]));

describe("the sandwich view", () => {
  it("sums callers and callees over all stacks", async () => {
    // Two different callers lead to this function, and it calls two others.
    for (const name of ["do_syscall_64", "shop::checkout::price_basket", "malloc"]) {
      await on(sandwichOf(name), async (page) => {
        const [callers, callees] = [await rowsOf(page, "callers", name), await rowsOf(page, "callees", name)];
        const expected = await neighbours(page, name);
        assert.deepEqual(totals(callers[1]), expected.callers);
        assert.deepEqual(totals(callees[1]), expected.callees);
        for (const [[root]] of [callers, callees]) assert.deepEqual([root.total, root.width], [expected.total, 1]);
        for (const { name: child, width, total } of [...callers[1], ...callees[1]]) assert.ok(Math.abs(width - total / expected.total) < 1e-6, child);
      });
    }
  });

  it("counts a stack of a recursive function once", async () => {
    await on(sandwichOf(PARSE), async (page) => {
      const [callers, callees] = [await rowsOf(page, "callers", PARSE), await rowsOf(page, "callees", PARSE)];
      const expected = await neighbours(page, PARSE);
      assert.deepEqual(totals(callers[1]), { "serde_json::de::from_slice": expected.total });
      assert.equal(callees.length, 52);
      for (const row of callees) assert.deepEqual(totals(row), { [PARSE]: expected.total });
      // The collector sums up the table by itself.
      const row = await page.$eval("table.top tr.chosen", (row) => row.textContent);
      const [, total] = /total (.+?) · self/.exec(await page.textContent(".sandwich header"));
      assert.ok(row.includes(total.split(" ").at(-1)), `${row} lacks ${total}`);
    });
  });

  it("draws callers with the function below and callees with it above", async () => {
    await on(sandwichOf("shop::checkout::place_order"), async (page) => {
      await rowsOf(page, "callees", "shop::checkout::place_order");
      const top = (part, name) =>
        page.$$eval(`.flame.${part} g.frame`, (groups, name) => groups.find((group) => group.__data__.data.name === name).getBoundingClientRect().top, name);
      assert.ok((await top("callers", "main")) < (await top("callers", "shop::server::handle")));
      assert.ok((await top("callers", "shop::server::handle")) < (await top("callees", "shop::checkout::place_order")));
      assert.ok((await top("callees", "shop::checkout::place_order")) < (await top("callees", "shop::checkout::pay")));
    });
  });

  it("opens by keys from the graph and from the table", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await page.waitForSelector("g.frame");
      await page.focus(".flame-graph");
      for (let step = 0; step < 8; step += 1) await page.keyboard.press("ArrowDown");
      await page.keyboard.press("s");
      await rowsOf(page, "callers", "shop::checkout::price_basket");
      await page.keyboard.press("/");
      await page.keyboard.type("malloc");
      await page.waitForFunction(() => document.querySelectorAll("table.top tbody tr").length === 3);
      const names = await page.$$eval("table.top tbody th button", (buttons) => buttons.map((button) => button.textContent));
      // One press of the tab key reaches the rows of the table, and arrow keys move among them.
      await page.locator("table.top tbody button[tabindex='0']").focus();
      assert.equal(await page.locator("table.top tbody button[tabindex='0']").count(), 1);
      await page.keyboard.press("End");
      await page.keyboard.press("ArrowUp");
      assert.equal(await page.evaluate(() => document.activeElement.textContent), names[1]);
      await page.keyboard.press("Enter");
      await rowsOf(page, "callees", names[1]);
      assert.equal(await page.getAttribute("table.top tr.chosen button", "aria-current"), "true");
    });
  });

  it("explains a function that the selection lacks", async () => {
    await on(sandwichOf("shop::search::rank"), async (page) => {
      await page.getByText("is in no stack of this selection").waitFor();
    });
    await on(`?${CHECKOUT}&show=sandwich`, async (page) => {
      await page.getByText("Choose a function in the table").waitFor();
      await accessible(page);
    });
  });

  it("shows differences in a comparison", async () => {
    await on(`${sandwichOf("shop::checkout::price_basket")}&compare=1`, async (page) => {
      await rowsOf(page, "callees", "shop::checkout::price_basket");
      assert.ok((await page.locator(".flame.callees g.frame.less").count()) > 0);
      await accessible(page);
    });
  });
});

describe("a link", () => {
  it("has the function, the order, the search and the zoom", async () => {
    await on(`?${CHECKOUT}&show=sandwich`, async (page) => {
      await page.getByRole("button", { name: "Total", exact: true }).click();
      await page.getByRole("button", { name: "shop::checkout::place_order", exact: true }).click();
      await rowsOf(page, "callees", "shop::checkout::place_order");
      await page.locator(".flame.callees g.frame").filter({ hasText: /^shop::checkout::price_basket$/ }).click();
      await page.waitForFunction(() => document.querySelector(".callees .crumbs [aria-current]")?.textContent === "shop::checkout::price_basket");
      await page.keyboard.press("/");
      await page.keyboard.type("vec");
      await page.waitForFunction(() => location.search.includes("search=vec") && document.querySelectorAll("g.frame.match").length > 0);
      const state = () =>
        page.evaluate(() => ({
          frames: [...document.querySelectorAll("g.frame")].map(({ __data__: { depth, x0, x1, data } }) => [data.name, depth, x0.toFixed(4), x1.toFixed(4)].join(" ")).sort(),
          rows: [...document.querySelectorAll("table.top tbody th")].map((cell) => cell.textContent),
          heads: document.querySelector(".sandwich header").textContent.replace(/[\d.]+ (s|min)/g, ""),
        }));
      const before = await state();
      await page.goto(page.url());
      await rowsOf(page, "callees", "shop::checkout::place_order");
      await page.waitForFunction(() => document.querySelector(".callees .crumbs") && document.querySelectorAll("g.frame.match").length > 0);
      assert.deepEqual(await state(), before);
    });
  });

  it("keeps every part of the state", async () => {
    const state = {
      q: "{a=\"b\"}", from: "now-3h", until: "now-1h", span: "1700000000000-1700000001000", time: "heat", rows: "pod", events: "1", type: "cpu/nanoseconds",
      profile: "01ARZ3NDEKTSV4RRFFQ69G5FAV", compare: "1", base: "", shift: "3600000", base_span: "1600000000000-1600000001000", sides: "1", search: "/x y/",
      zoom: "1a-2b", show: "sandwich", function: "a::b<c>", function_file: "/lib/x.so", sort: "-total", hide: "kernel,python", only: "a|b", without: "c+", span_id: "00f067aa0ba902b7",
      colour: "kind", red_green: "1", absolute: "1", flip: "1", interpreters: "1", hide_errors: "1", live: "1", nodes: "n", theme: "dark",
    };
    await on(`nodes?${new URLSearchParams(state)}`, async (page) => {
      await page.getByRole("link", { name: "Rules" }).click();
      await page.waitForURL(/rules/);
      assert.deepEqual(Object.fromEntries(new URL(page.url()).searchParams), state);
    });
  });

  it("goes back and forward through the chosen functions", async () => {
    await on(`?${CHECKOUT}&show=sandwich`, async (page) => {
      for (const name of ["malloc", "sysmalloc"]) {
        await page.getByRole("button", { name, exact: true }).click();
        await rowsOf(page, "callees", name);
      }
      await page.goBack();
      await rowsOf(page, "callees", "malloc");
      await page.goBack();
      await page.getByText("Choose a function in the table").waitFor();
      await page.goForward();
      await page.goForward();
      await rowsOf(page, "callees", "sysmalloc");
    });
  });

  it("can ask for a colour scheme, which the reader's own choice survives", async () => {
    await on("?theme=dark", async (page) => {
      const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
      const dark = await background();
      await page.getByRole("link", { name: "Nodes" }).click();
      assert.equal(await background(), dark);
      await page.goto(new URL("./", page.url()).href);
      const light = await background();
      assert.notEqual(light, dark);
      await page.getByRole("button", { name: /^Colour scheme: auto/ }).click();
      await page.getByRole("button", { name: /^Colour scheme: light/ }).click();
      // The page changes its colours and its link after it has handled the click.
      await page.waitForFunction((wanted) => getComputedStyle(document.body).backgroundColor === wanted, dark);
      await page.waitForURL(/theme=dark/);
    }, { colorScheme: "light" });
  });
});
