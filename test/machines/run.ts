import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import type { Arch } from '../../lib/model_options.ts';
import { Problem } from './command.ts';
import { kernelFor } from './kernel.ts';
import type { Machine } from './machines.ts';
import { prebuild } from './prebuild.ts';
import { clone, cloneInDebian, debianRoot } from './root.ts';

export const emulators: Record<Arch, string> = { x86_64: 'qemu-system-x86_64', aarch64: 'qemu-system-aarch64' };

export interface RunOptions {
  /** Gets what the program prints. Without it that goes where this process prints. */
  readonly onOutput?: (text: string) => void;
  /** Milliseconds for everything, from the start of QEMU. */
  readonly deadline?: number;
  readonly env?: Readonly<Record<string, string>>;
  /** Another kernel than Debian's newest. */
  readonly kernel?: string;
  /** Leaves a shell on this terminal when the program has ended. */
  readonly keep?: boolean;
}

export interface RunResult {
  /** The exit status of the program; undefined if the machine did not say that it ended. */
  readonly status: number | undefined;
  /** Why not. */
  readonly problem?: string;
  /** Milliseconds until the program started, and until it ended. */
  readonly boot: number;
  readonly total: number;
}

/** What the machine leaves here: `.tap` of the clone inside is this folder. */
export function resultsOf(machine: Machine): string {
  return join(clone, '.tap/machines', machine.name);
}

/** What its kernel says. */
export function consoleOf(machine: Machine): string {
  return join(resultsOf(machine), 'console.log');
}

/**
 * Boots a machine and runs Node in it, in the clone: `args` are a script and its arguments, relative to the clone. The clone has to be
 * built. What the program writes into `.tap` is left in `resultsOf(machine)`.
 */
export async function runInMachine(
  machine: Machine,
  args: readonly string[],
  options: RunOptions = {},
): Promise<RunResult> {
  const { onOutput, deadline = 40 * 60_000, keep = false } = options;
  const image = options.kernel ?? (await kernelFor(machine));
  const isHost = machine.root === 'host';
  if (!isHost) prebuild('arm64');
  const root = isHost ? '/' : await debianRoot();
  const results = resultsOf(machine);
  mkdirSync(results, { recursive: true });
  const node = isHost ? process.execPath : '/usr/bin/node';
  writeFileSync(join(results, 'command.sh'), commandFile(node, args, { ...options.env, MACHINE: machine.name }));

  const sockets = mkdtempSync(join(tmpdir(), 'guest-memfd-machine-'));
  const start = Date.now();
  let [boot, control, ended] = [0, '', false];
  let status: number | undefined;
  const ports = [
    onOutput ?? ((text: string) => process.stdout.write(text)),
    (text: string) => process.stderr.write(text),
    (text: string) => {
      control += text;
      if (!boot && control.includes('started')) boot = Date.now() - start;
      const [, said] = /ended (\d+)\n/.exec(control) ?? [];
      if (said === undefined || ended) return;
      [ended, status] = [true, Number(said)];
      if (!keep) qemu.kill();
    },
  ].map((onData, index) => listen(join(sockets, String(index + 1)), onData));
  await Promise.all(ports.map(({ listening }) => listening));

  const console = consoleOf(machine);
  const path = isHost ? clone : cloneInDebian;
  const append = [
    ...machine.kernel,
    ...['root=root', 'rootfstype=9p', 'rootflags=trans=virtio,version=9p2000.L,msize=512000,cache=loose', 'ro'],
    // Who waits for all readers waits for emulated timers otherwise.
    ...[
      'rcupdate.rcu_expedited=1',
      'panic=-1',
      `init=${isHost ? `"${path}/test/machines/init.sh"` : '/init'}`,
      `CLONE="${path}"`,
    ],
    ...(isHost ? [] : ['HIDE_BUILD=1']),
    ...(keep ? [`KEEP=/dev/${machine.arch === 'x86_64' ? 'ttyS0' : 'ttyAMA0'}`] : []),
  ];
  const shared: [string, string, string][] = [
    ['root', root, 'on'],
    ['clone', clone, 'on'],
    ['results', results, 'off'],
  ];
  const qemu = spawn(
    emulators[machine.arch],
    [
      ...machine.qemu,
      ...['-accel', 'tcg,thread=multi', '-smp', '2', '-nodefaults', '-display', 'none', '-no-reboot'],
      ...['-serial', keep ? 'mon:stdio' : `file:${console}`],
      ...['-kernel', image, '-append', append.join(' ')],
      ...shared.flatMap(([tag, path, readonly]) => [
        ...['-fsdev', `local,id=${tag},path=${path},security_model=none,multidevs=remap,readonly=${readonly}`],
        ...['-device', `virtio-9p-pci,fsdev=${tag},mount_tag=${tag}`],
      ]),
      ...['-device', 'virtio-serial-pci', '-device', 'virtio-rng-pci'],
      ...[1, 2, 3].flatMap((nr) => [
        ...['-chardev', `socket,id=port${nr},path=${join(sockets, String(nr))}`],
        ...['-device', `virtserialport,chardev=port${nr},nr=${nr}`],
      ]),
    ],
    { stdio: [keep ? 'inherit' : 'ignore', keep ? 'inherit' : 'ignore', 'pipe'] },
  );
  let said = '';
  qemu.stderr?.on('data', (text) => {
    said += text;
  });
  const problem = await over(qemu, keep ? undefined : deadline);
  await Promise.all(ports.map(({ done }) => done));
  for (const { server } of ports) server.close();
  rmSync(sockets, { recursive: true, force: true });
  const times = { boot, total: Date.now() - start };
  if (ended) return { status, ...times };
  const last = keep ? '' : readFileSync(console, 'utf8').split('\n').slice(-15).join('\n');
  return { status: undefined, problem: `${problem ?? 'it went down'} ${said}\n${last}`.trim(), ...times };
}

/** Waits for QEMU's end, and hastens it at the deadline. */
async function over(qemu: ChildProcess, deadline: number | undefined): Promise<string | undefined> {
  let problem: string | undefined;
  const timer =
    deadline &&
    setTimeout(() => {
      problem = `it did not finish in ${Math.round(deadline / 1000)} s`;
      qemu.kill('SIGKILL');
    }, deadline);
  const interrupted = (): void => process.exit(130);
  const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;
  const kill = (): unknown => qemu.kill('SIGKILL');
  for (const signal of signals) process.once(signal, interrupted);
  process.once('exit', kill);
  try {
    await new Promise<void>((resolve, reject) => {
      qemu.once('error', (error) => reject(new Problem(`QEMU does not start: ${error.message}`)));
      qemu.once('exit', () => resolve());
    });
  } finally {
    clearTimeout(timer);
    for (const signal of signals) process.off(signal, interrupted);
    process.off('exit', kill);
  }
  return problem;
}

/** A serial port of the machine: QEMU connects to it once. */
function listen(path: string, onData: (text: string) => void) {
  let finished: () => void = () => {};
  // A machine that dies before it connects has nothing more to say either.
  let done: Promise<void> = Promise.resolve();
  const server = createServer((socket) => {
    done = new Promise((resolve) => {
      finished = resolve;
    });
    socket.setEncoding('utf8').on('data', onData).on('close', finished).on('error', finished);
  });
  const listening = new Promise<void>((resolve) => server.listen(path, resolve));
  return {
    server,
    listening,
    get done() {
      return done;
    },
  };
}

function commandFile(node: string, args: readonly string[], env: Readonly<Record<string, string>>): string {
  const quoted = (text: string) => `'${text.replaceAll("'", "'\\''")}'`;
  return [
    `export PATH=${quoted(dirname(node))}:"$PATH"`,
    ...Object.entries(env).map(([name, value]) => `export ${name}=${quoted(value)}`),
    `exec ${[node, '--import', './dist/test/machines/first_vm.js', ...args].map(quoted).join(' ')}`,
    '',
  ].join('\n');
}
