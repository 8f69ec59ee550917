// A headless Chromium, driven over its own pipe by the DevTools protocol: no driver package, and no port.

import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

const SWITCHES = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"];

/** The browser that CHROME names, else the one of the npm package, which is for Linux on x86-64. */
async function executable() {
  if (process.env.CHROME) return process.env.CHROME;
  try {
    const { default: chromium } = await import("@sparticuz/chromium");
    return await chromium.executablePath();
  } catch (error) {
    throw new Error(`no Chromium from npm (${error.message}); set CHROME to one`);
  }
}

/** Starts the browser with one page open. */
export async function launch() {
  const profile = await mkdtemp(join(tmpdir(), "dmd-web-"));
  const switches = [...SWITCHES, `--user-data-dir=${profile}`, "about:blank"];
  const browser = spawn(await executable(), switches, { stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"] });
  const [input, output] = [browser.stdio[3], browser.stdio[4]];
  const waiting = new Map();
  const problems = [];
  let [last, buffered] = [0, ""];

  const fail = (reason) => waiting.forEach(({ reject }) => reject(new Error(reason)));
  browser.once("error", (error) => fail(`the browser cannot be started: ${error.message}`));
  browser.once("exit", (code) => fail(`the browser ended with code ${code}`));
  input.on("error", () => {}); // The end of the browser is reported by the line above.
  output.setEncoding("utf8").on("data", (text) => {
    const messages = (buffered + text).split("\0");
    buffered = messages.pop();
    messages.map((message) => JSON.parse(message)).forEach(receive);
  });

  function receive({ id, result, error, method, params }) {
    if (method === "Runtime.exceptionThrown") problems.push(params.exceptionDetails.exception?.description);
    if (method === "Runtime.consoleAPICalled" && params.type === "error") problems.push(params.args[0]?.value);
    if (!waiting.has(id)) return;
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    error ? reject(new Error(error.message)) : resolve(result);
  }

  function send(method, params = {}, sessionId) {
    const id = ++last;
    input.write(`${JSON.stringify({ id, method, params, sessionId })}\0`);
    return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
  }

  const { targetId } = await send("Target.createTarget", { url: "about:blank" });
  const { sessionId } = await send("Target.attachToTarget", { targetId, flatten: true });
  const call = (method, params) => send(method, params, sessionId);
  await call("Runtime.enable");
  await call("Page.enable");

  /** The value of an expression in the page; promises are awaited. */
  async function evaluate(expression) {
    const options = { expression, awaitPromise: true, returnByValue: true };
    const { result, exceptionDetails } = await call("Runtime.evaluate", options);
    if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
    return result.value;
  }

  return {
    /** What the page has reported as an error. */
    problems,
    call,
    evaluate,
    open: (url) => call("Page.navigate", { url }),
    /** Waits until an expression is true, ten seconds at most. */
    async until(expression) {
      for (const end = Date.now() + 10_000; Date.now() < end; ) {
        if (await evaluate(expression).catch(() => false)) return;
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      throw new Error(`never came true: ${expression}; the page says ${await evaluate("document.body.innerText")}`);
    },
    async close() {
      const ended = new Promise((resolve) => browser.once("exit", resolve));
      send("Browser.close").catch(() => {});
      await ended;
      await rm(profile, { recursive: true, force: true, maxRetries: 5 });
    },
  };
}
