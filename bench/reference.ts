// What the C programs have in common: compiled here, run with as many threads as this process, asked for one round at a time.
import { type ChildProcessWithoutNullStreams, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

export const NO_COMPILER = 'no C compiler here (cc, gcc or clang) to build what it is compared with';

/** bench/<name>.c, running. */
export class Reference {
  readonly #name: string;
  readonly #process: ChildProcessWithoutNullStreams;
  readonly #answers: NodeJS.AsyncIterator<string>;
  readonly #closed: Promise<void>;

  /** Null where nothing compiles it. */
  static start(name: string, args: readonly string[] = []): Reference | null {
    const directory = mkdtempSync(join(tmpdir(), 'guest-memfd-bench-'));
    const program = compile(name, directory);
    if (program) return new Reference(name, program, args, directory);
    rmSync(directory, { recursive: true });
    return null;
  }

  private constructor(name: string, program: string, args: readonly string[], directory: string) {
    const threads = readdirSync('/proc/self/task').length;
    this.#name = name;
    this.#process = spawn(program, [String(threads - 1), ...args]);
    this.#closed = new Promise((resolve) => {
      this.#process.once('close', () => {
        rmSync(directory, { recursive: true });
        resolve();
      });
    });
    this.#process.stderr.pipe(process.stderr);
    this.#answers = createInterface({ input: this.#process.stdout })[Symbol.asyncIterator]();
  }

  /** Nanoseconds per call. */
  async time(name: string, calls: number): Promise<number> {
    if (!this.#process.stdin.write(`${name} ${calls}\n`)) await once(this.#process.stdin, 'drain');
    const { value, done } = await this.#answers.next();
    const total = Number(value);
    if (done || !(total > 0)) throw new Error(`bench/${this.#name}.c: ${name} failed: ${value}`);
    return total / calls;
  }

  async close(): Promise<void> {
    this.#process.stdin.end();
    await this.#closed;
  }
}

function compile(name: string, directory: string): string | undefined {
  const source = fileURLToPath(new URL(`../../bench/${name}.c`, import.meta.url));
  const program = join(directory, name);
  const compilers = process.env.CC ? [process.env.CC] : ['cc', 'gcc', 'clang'];
  for (const compiler of compilers) {
    const built = spawnSync(compiler, ['-O2', '-pthread', '-o', program, source], {
      stdio: ['ignore', 'ignore', 'inherit'],
    });
    if (built.status === 0) return program;
  }
  return undefined;
}
