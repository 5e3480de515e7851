// Tests of the comparison side by side, of the heat map, and of captures and changes of rules on the timeline.
import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { CHECKOUT, accessible, hueOf, withPage } from "./page.mjs";

const { on } = withPage();

const [NEW_POD, OLD_POD] = ["checkout-5d8f9c7b66-x2k4q", "checkout-7b54c8d6f9-m7w2c"];
const selector = (pod) => `{service_name="checkout",pod="${pod}"}`;
const SIDES = `?q=${encodeURIComponent(selector(OLD_POD))}&base=${encodeURIComponent(selector(NEW_POD))}&type=cpu%2Fnanoseconds&compare=1&sides=1`;

/** Returns the share of each function of one pod, as the collector sums them up. */
const sharesOf = (page, pod) =>
  page.evaluate(async (query) => {
    const until = Date.now();
    const answer = await fetch(`./api/v1/top?query=${encodeURIComponent(query)}&from=${until - 3600e3}&until=${until}&type=cpu/nanoseconds&limit=1000`);
    const { rows, total } = await answer.json();
    return Object.fromEntries(rows.map((row) => [row.name, row.total / total]));
  }, selector(pod));

/** Returns the outermost frames of one side by name: part of the width, fill. */
async function sideOf(page, side) {
  await page.waitForFunction((side) => document.querySelectorAll(`.flame.${side} g.frame`).length > 5 && !document.querySelector(".spinner"), side);
  const frames = await page.$$eval(`.flame.${side} g.frame`, (groups) =>
    groups.map((group) => ({ name: group.__data__.data.name, width: group.__data__.x1 - group.__data__.x0, delta: group.__data__.data.delta, fill: group.querySelector("rect").getAttribute("fill") })),
  );
  return Object.fromEntries(frames.reverse().map((frame) => [frame.name, frame]));
}

/** Converts a colour to CIE L*a*b*, as a reader with a kind of colour blindness sees it (Machado, Oliveira and Fernandes 2009). */
const VISION = {
  "full colour vision": [1, 0, 0, 0, 1, 0, 0, 0, 1],
  protanopia: [0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998],
  deuteranopia: [0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.01182, 0.04294, 0.968881],
  tritanopia: [1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.3039],
};
function seen(rgb, matrix) {
  const linear = rgb.map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  const [r, g, b] = [0, 3, 6].map((row) => Math.min(1, Math.max(0, matrix[row] * linear[0] + matrix[row + 1] * linear[1] + matrix[row + 2] * linear[2])));
  const f = (t) => (t > 0.008856 ? Math.cbrt(t) : 7.787 * t + 16 / 116);
  const [x, y, z] = [(0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505, 0.2126 * r + 0.7152 * g + 0.0722 * b, (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089].map(f);
  return [116 * y - 16, 500 * (x - y), 200 * (y - z)];
}
const distance = (a, b) => Math.hypot(...a.map((part, at) => part - b[at]));

const rgbOf = (page, fill) =>
  page.evaluate((colour) => {
    const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  }, fill);

describe("two values of a label", () => {
  it("are chosen by keys and stand side by side on one scale", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await page.getByRole("button", { name: "Compare", exact: true }).click();
      await page.getByRole("button", { name: "Compare two values of a label" }).focus();
      await page.keyboard.press("Enter");
      const box = page.getByRole("dialog", { name: "Compare two values of a label" });
      for (const [field, text] of [["Label", "pod"], ["Base value", NEW_POD], ["Comparison value", OLD_POD]]) {
        await box.getByRole("combobox", { name: field, exact: true }).focus();
        await page.keyboard.type(text);
        await box.getByRole("option", { name: text, exact: true }).waitFor();
        await page.keyboard.press("Enter");
      }
      await accessible(page);
      await box.getByRole("button", { name: "Compare side by side" }).click();
      const [base, comparison] = [await sideOf(page, "base"), await sideOf(page, "comparison")];
      for (const [frames, pod] of [[base, NEW_POD], [comparison, OLD_POD]]) {
        const shares = await sharesOf(page, pod);
        for (const name of ["shop::checkout::price_basket", "shop::checkout::pay", "main"]) {
          assert.ok(Math.abs(frames[name].width - shares[name]) < 1e-6, `${name} of ${pod}: ${frames[name].width}, is ${shares[name]}`);
        }
        assert.equal(frames.all.width, 1);
      }
      // The old version spends more on prices, on both sides in one colour.
      for (const frames of [base, comparison]) {
        assert.equal(hueOf(frames["shop::checkout::price_basket"].fill), 60);
        assert.equal(hueOf(frames["shop::checkout::pay"].fill), 250);
      }
      const heads = await page.$$eval(".sides h3", (heads) => heads.map((head) => head.textContent));
      assert.ok(heads[0].includes(NEW_POD) && heads[1].includes(OLD_POD), `${heads}`);
      assert.equal(await page.inputValue("#selector-"), selector(OLD_POD));
    });
  });

  it("keep their scale in a zoom, and a link shows the same", async () => {
    await on(SIDES, async (page) => {
      const before = [await sideOf(page, "base"), await sideOf(page, "comparison")].map((frames) => frames["shop::checkout::price_basket"].width);
      await page.locator(".flame.base g.frame").filter({ hasText: /^shop::checkout::price_basket/ }).click();
      await page.waitForFunction(() => location.search.includes("zoom="));
      const widths = async () => [await sideOf(page, "base"), await sideOf(page, "comparison")].map((frames) => frames["shop::checkout::price_basket"].width);
      const after = await widths();
      assert.equal(Math.max(...after), 1);
      assert.ok(Math.abs(after[0] / after[1] - before[0] / before[1]) < 1e-6, `${before} became ${after}`);
      // The picked frame is marked on both sides.
      assert.equal(await page.locator("g.frame.current").count(), 2);
      await page.goto(page.url());
      const again = await widths();
      assert.ok(again.every((width, at) => Math.abs(width - after[at]) < 1e-3), `${after} became ${again}`);
    });
  });

  it("have colours that colour-blind readers can distinguish", async () => {
    for (const colorScheme of ["light", "dark"]) {
      await on(SIDES, async (page) => {
        await sideOf(page, "base");
        const ramp = await page.$$eval(".ramp i", (steps) => steps.map((step) => step.style.background));
        const [less, same, more] = [ramp[0], ramp[4], ramp.at(-1)];
        const colours = await Promise.all([less, same, more].map((fill) => rgbOf(page, fill)));
        for (const [vision, matrix] of Object.entries(VISION)) {
          const [l, s, m] = colours.map((colour) => seen(colour, matrix));
          for (const [name, a, b] of [["less and more", l, m], ["less and same", l, s], ["more and same", m, s]]) {
            assert.ok(distance(a, b) > 18, `${colorScheme}, ${vision}: ${name} differ by ${distance(a, b)}`);
          }
        }
        await accessible(page);
      }, { colorScheme });
    }
  });

  it("can be compared by amounts, which keeps the smaller side narrower", async () => {
    await on(`${SIDES}&absolute=1`, async (page) => {
      const [base, comparison] = [await sideOf(page, "base"), await sideOf(page, "comparison")];
      assert.equal(base.all.width, 1);
      assert.ok(comparison.all.width < 0.5, `${comparison.all.width}`);
    });
  });
});

/** Returns the answer of the API for the heat map that the page shows. */
async function heatOf(page, action) {
  const [response] = await Promise.all([page.waitForResponse((response) => response.url().includes("/heatmap?")), action()]);
  return response.json();
}

describe("the heat map", () => {
  it("shows values by height and picks a range by dragging", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await page.waitForSelector("g.frame");
      const map = await heatOf(page, () => page.getByRole("button", { name: "Heat map" }).click());
      assert.equal(map.rows.length, 20);
      // Painting sets the size of the canvas, which would be 300 by 150 otherwise.
      await page.waitForFunction((rows) => {
        const canvas = document.querySelector(".heat canvas");
        return canvas && canvas.width === canvas.clientWidth && canvas.height === canvas.clientHeight && canvas.height % rows === 0;
      }, map.rows.length);
      // Each column that has profiles is painted in the row of their values.
      const painted = await page.evaluate((columns) => {
        const drawn = document.querySelector(".heat canvas");
        const context = new OffscreenCanvas(drawn.width, drawn.height).getContext("2d", { willReadFrequently: true });
        context.drawImage(drawn, 0, 0);
        const [wide, high] = [drawn.width * columns.part, drawn.height / columns.rows.length];
        const isPainted = (x, y) => context.getImageData(Math.floor(x), Math.floor(y), 1, 1).data[3] > 0;
        return columns.rows.map(({ cells }, row) => cells.map((_, column) => isPainted((column + 0.4) * wide, (columns.rows.length - 1 - row + 0.4) * high)));
      }, { rows: map.rows, part: map.step_ms / 3600e3 });
      assert.deepEqual(painted, map.rows.map(({ cells }) => cells.map((cell) => cell > 0)));
      const before = await page.textContent(".numbers .big");
      const box = await page.locator(".heat .plot").boundingBox();
      await page.mouse.move(box.x + box.width * 0.6, box.y + 60);
      await page.mouse.down();
      await page.mouse.move(box.x + box.width * 0.8, box.y + 60, { steps: 5 });
      await page.mouse.up();
      await page.waitForFunction((former) => ![undefined, former].includes(document.querySelector(".numbers .big")?.textContent), before);
      assert.match(page.url(), /time=heat.*span=\d+-\d+|span=\d+-\d+.*time=heat/);
    });
  });

  it("that the collector cannot make shows why", async () => {
    await on(`?${CHECKOUT}`, async (page, faults) => {
      await page.waitForSelector("g.frame");
      await page.route("**/heatmap?*", (route) => route.fulfill({ status: 500, json: { error: "the label has too many values" } }));
      await page.getByRole("button", { name: "Heat map" }).click();
      await page.locator(".problem", { hasText: "the label has too many values" }).waitFor();
      faults.splice(0, faults.length, ...faults.filter((fault) => !/status of 500/.test(fault)));
    });
    // Any range has few enough columns.
    await on(`?${CHECKOUT}&from=0&time=heat`, async (page) => {
      await page.waitForSelector(".row-name");
      assert.equal(await page.locator(".problem").count(), 0);
    });
  });

  it("has a row for each value of a label, and keys read, pick and select", async () => {
    await on(`?${CHECKOUT}&time=heat`, async (page) => {
      await page.waitForSelector(".heat canvas");
      const map = await heatOf(page, () => page.getByLabel("Rows").selectOption("pod"));
      assert.deepEqual(map.rows.map(({ name }) => name), [NEW_POD, OLD_POD]);
      await page.waitForFunction((pod) => [...document.querySelectorAll(".row-name")].some((name) => name.textContent === pod), OLD_POD);
      await page.focus(".heat .plot");
      await page.keyboard.press("ArrowDown");
      await page.keyboard.press("ArrowDown");
      await page.keyboard.press("ArrowLeft");
      const text = () => page.getAttribute(".heat .plot", "aria-valuetext");
      assert.match(await text(), new RegExp(`^\\d\\d:\\d\\d:\\d\\d, ${OLD_POD}: `));
      const last = map.rows[1].cells.findLastIndex((cell) => cell > 0);
      for (let column = map.rows[1].cells.length - 1; column > last; column -= 1) await page.keyboard.press("ArrowLeft");
      assert.match(await text(), new RegExp(`${OLD_POD}: [\\d.]+ (m?s|min)`));
      await page.keyboard.press("Shift+ArrowLeft");
      await page.keyboard.press("Shift+ArrowLeft");
      await page.waitForFunction(() => location.search.includes("span="));
      await page.keyboard.press("Escape");
      await page.waitForFunction(() => !location.search.includes("span="));
      await page.keyboard.press("Enter");
      await page.waitForFunction((query) => document.querySelector(".selector input")?.value === query, selector(OLD_POD));
      await page.goBack();
      await page.waitForFunction(() => document.querySelector(".selector input")?.value === '{service_name="checkout"}');
    });
  });

  for (const colorScheme of ["light", "dark"]) {
    it(`has no accessibility fault in ${colorScheme}, also in a comparison`, async () => {
      await on(`?${CHECKOUT}&time=heat&rows=pod&compare=1`, async (page) => {
        await page.waitForFunction(() => document.querySelectorAll(".heat canvas").length === 2 && !document.querySelector(".spinner"));
        await page.waitForSelector(".row-name");
        await accessible(page);
      }, { colorScheme });
    });
  }
});

describe("captures and changes of rules", () => {
  it("have marks on the timeline, which the cursor reads", async () => {
    await on(`?${CHECKOUT}`, async (page) => {
      await page.waitForSelector(".marks .capture");
      assert.equal(await page.locator(".marks .capture").count(), 1);
      assert.ok((await page.locator(".marks .change-mark").count()) >= 1);
      await page.focus(".plot");
      let text = "";
      for (let step = 0; step < 60 && !text.includes("capture of rule"); step += 1) {
        await page.keyboard.press("ArrowLeft");
        text = await page.getAttribute(".plot", "aria-valuetext");
      }
      assert.match(text, /capture of rule shop-pressure of checkout on node-a: pressure; cpu some: 187 ms of stall in 1 s, 8 profiles/);
    });
  });

  it("are listed, and a capture leads to its range", async () => {
    for (const colorScheme of ["light", "dark"]) {
      await on(`?${CHECKOUT}`, async (page) => {
        await page.locator(".events summary", { hasText: "1 capture" }).click();
        const list = page.locator(".events li");
        assert.match(await list.last().textContent(), /80 s.*capture of rule shop-pressure/);
        assert.match(await list.first().textContent(), /rules of shop: added shop, shop-blocked, shop-pressure, by anonymous, revision 1/);
        await accessible(page);
        const before = await page.textContent(".numbers .big");
        await page.getByRole("button", { name: /^Show the range of the capture/ }).click();
        await page.waitForFunction((former) => ![undefined, former].includes(document.querySelector(".numbers .big")?.textContent), before);
        const [, from, until] = /span=(\d+)-(\d+)/.exec(page.url());
        assert.equal(until - from, 80_000);
        assert.match(page.url(), /events=1/);
        await page.goto(page.url());
        await list.last().waitFor();
      }, { colorScheme });
    }
  });

  it("of another selection or range are not shown", async () => {
    await on(`?q=${encodeURIComponent('{service_name="search"}')}`, async (page) => {
      await page.locator(".events summary", { hasText: "0 captures" }).waitFor();
    });
    await on(`?${CHECKOUT}&from=1700000000000&until=1700003600000`, async (page) => {
      await page.getByText("No captures or changes of rules in this range").waitFor();
    });
  });
});
