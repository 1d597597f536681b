// What a person sees: the command line and the examples, as child processes.
import { type SpawnSyncReturns, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { stripVTControlCharacters } from 'node:util';
import t, { type Test } from 'tap';
import { demo } from '../lib/cli/demo.ts';
import { demoAsJson, demoAsText } from '../lib/cli/demo_output.ts';
import { drawLegend, drawMap, memoryMap } from '../lib/cli/memory_map.ts';
import { type DemoOptions, parseCommand } from '../lib/cli/options.ts';
import { amount, code, place, wrap } from '../lib/cli/text.ts';
import { GiB, KiB, Kvm, MiB } from '../lib/index.ts';
import { realKernel } from './kvm_host.ts';

const root = fileURLToPath(new URL('../..', import.meta.url));
const main = join(root, 'dist/lib/cli/main.js');
const NOBODY = 65534;
const hasKvm = !('reason' in realKernel());
// What the environment of the tests says about colours and debugging must not decide.
const { CI, NO_COLOR, FORCE_COLOR, DEBUG, NODE_OPTIONS, ...env } = process.env;

interface Ran {
  readonly status: number | null;
  readonly out: string;
  readonly err: string;
}

function run(args: readonly string[], more: { env?: Record<string, string>; uid?: number; gid?: number } = {}): Ran {
  return node([main, ...args], more);
}

function node(args: readonly string[], more: { env?: Record<string, string>; uid?: number; gid?: number } = {}): Ran {
  return ran(spawnSync(process.execPath, args, { cwd: root, ...more, encoding: 'utf8', env: { ...env, ...more.env } }));
}

function ran({ status, stdout, stderr }: SpawnSyncReturns<string>): Ran {
  return { status, out: stdout ?? '', err: stderr ?? '' };
}

function longestLine(text: string): number {
  return Math.max(...text.split('\n').map((line) => [...stripVTControlCharacters(line)].length));
}

interface Step {
  readonly id: string;
  readonly backend: string;
  readonly kernel: string;
  readonly vmType: string;
  readonly numbers: Record<string, number>;
  readonly refusal: { code: string; message: string } | null;
  readonly held: { shared: number; private: number };
  readonly memslots: { address: number; size: number; privateBytes: number }[];
}
interface Part {
  readonly backend: string;
  readonly vmType: string;
  readonly privateMemory: boolean;
  readonly notes: string[];
  readonly steps: Step[];
}

function demoParts(test: Test, args: readonly string[]): Part[] {
  const { status, out, err } = run(['demo', '--json', ...args]);
  test.same([status, err], [0, ''], 'ends well and silently');
  return (JSON.parse(out) as { parts: Part[] }).parts;
}

/** The same in this process. */
async function partsHere(args: readonly string[]): Promise<Part[]> {
  let json = '';
  await demoAsJson(demo(demoOptions(args)), (more) => {
    json += more;
  });
  return (JSON.parse(json) as { parts: Part[] }).parts;
}

function demoOptions(args: readonly string[]): DemoOptions {
  const command = parseCommand(['demo', ...args]);
  if (command.name !== 'demo') throw new Error(`that is ${command.name}`);
  return command.options;
}

t.test('help', async (t) => {
  for (const args of [[], ['--help'], ['-h'], ['help']])
    t.same(parseCommand(args), { name: 'help', topic: undefined }, `guest-memfd ${args.join(' ')}`);
  const { status, out, err } = run([]);
  t.same([status, err], [0, '']);
  t.match(out, /Usage: guest-memfd <command>[\s\S]*Examples:\n {2}guest-memfd probe/);
  t.ok(longestLine(out) <= 80, 'fits 80 columns');
  for (const topic of ['probe', 'demo']) {
    const { status, out } = run(['help', topic]);
    t.equal(status, 0);
    t.ok(out.includes(`Usage: guest-memfd ${topic} [options]`));
    t.match(out, /--backend NAME/);
    t.ok(out.includes(`Examples:\n  guest-memfd ${topic}\n`));
    t.same(parseCommand([topic, '--help']), { name: 'help', topic }, `${topic} --help is help ${topic}`);
    t.ok(longestLine(out) <= 80, 'fits 80 columns');
  }
});

t.test('version', async (t) => {
  const { status, out } = run(['--version']);
  t.equal(status, 0);
  t.match(out, /^\d+\.\d+\.\d+\n$/);
});

t.test('what cannot be is one line, a hint and status 2', async (t) => {
  const cases: readonly [string, RegExp][] = [
    ['nosuch', /unknown command 'nosuch'; there are probe, demo and help$/],
    ['help nosuch', /unknown command 'nosuch'/],
    ['--nosuch', /unknown option '--nosuch'/],
    ['probe --nosuch', /unknown option '--nosuch'$/],
    ['demo extra', /unexpected argument 'extra'$/],
    ['demo --memory', /'--memory <value>' argument missing/],
    ['demo --json=yes', /'--json' does not take an argument/],
    ['demo --memory 5X', /--memory takes whole MiB from 8M to 256G, like 512M or 8G; not '5X'/],
    ['demo --memory=-1G', /--memory takes/],
    ['demo --memory 4096', /--memory takes/],
    ['demo --memory 8000000G', /--memory takes/],
    ['demo --memory NaN', /--memory takes/],
    ['probe --backend xen', /--backend is one of auto, kvm, software; not 'xen'/],
    ['probe --kernel 5.1', /--kernel is one of 6\.8, .*; not '5\.1'/],
    ['probe --arch mips', /--arch is one of x86_64, aarch64; not 'mips'/],
    ['probe --backend kvm --kernel 6.8', /what the software kernel plays, not '--backend kvm'/],
    ['probe --device=', /--device needs a path/],
  ];
  for (const [args, message] of cases) {
    t.throws(() => parseCommand(args.split(' ')), { name: 'UsageError', message }, args);
  }
  for (const [args, hint] of [
    ['nosuch', 'help'],
    ['demo --memory 5X', 'help demo'],
    ['probe --nosuch', 'help probe'],
  ] as const) {
    const { status, out, err } = run(args.split(' '));
    t.same([status, out], [2, ''], args);
    t.match(err, /^guest-memfd: .*\nTry: .*\n$/);
    t.ok(err.endsWith(`Try: guest-memfd ${hint}\n`));
  }
});

t.test('probe, in JSON', async (t) => {
  const { status, out, err } = run(['probe', '--json', '--backend', 'software']);
  t.same([status, err], [0, '']);
  const found = JSON.parse(out);
  t.match(found, {
    version: String,
    node: process.versions.node,
    backend: 'software',
    fallbackReason: null,
    kernel: '7.3',
    arch: 'x86_64',
    pageSize: 4096,
    apiVersion: 12,
    vmTypes: { creatable: ['default', 'sw-protected'], missing: { snp: /SEV-SNP/, tdx: /Intel/ } },
    privateMemory: ['sw-protected'],
    notAsked: {},
  });
  t.same(Object.keys(found.capabilities), found.vmTypes.creatable);
  t.same(found.capabilities['sw-protected'].memoryAttributes, { value: '0x8', evidence: 'modelled' });
  t.same(found.capabilities.default.conversion, { value: 'none', evidence: 'probed' });
  const older = JSON.parse(run(['probe', '--json', '--kernel', '6.8']).out);
  t.match(older, { backend: 'software', kernel: '6.8', capabilities: { default: { guestMemfd: { value: false } } } });
  const arm = JSON.parse(run(['probe', '--json', '--arch', 'aarch64']).out);
  t.match(arm, {
    backend: 'software',
    arch: 'aarch64',
    vmTypes: { creatable: ['default'], missing: { protected: /pkvm|protected/ } },
  });
});

t.test('probe, as text', async (t) => {
  const { status, out, err } = run(['probe', '--backend', 'software']);
  t.same([status, err], [0, '']);
  t.match(out, /backend +software kernel/);
  t.match(out, /private memory +yes: VMs of type sw-protected/);
  t.match(out, /✗ tdx +needs an Intel processor/);
  t.match(out, /conversion +none +attributes +probed/);
  t.ok(longestLine(out) <= 80, 'fits 80 columns');
  t.equal(out, stripVTControlCharacters(out), 'a pipe gets no colours');
});

t.test('the demo on the software kernel: every number', async (t) => {
  const [part, ...others] = demoParts(t, ['--backend', 'software', '--type', 'sw-protected']);
  t.same(others, []);
  t.match(part, { backend: 'software', vmType: 'sw-protected', privateMemory: true, notes: [/Simulated/] });
  const steps = part?.steps ?? [];
  t.same(
    steps.map(({ id, held }) => [id, held.shared, held.private]),
    [
      ['create', 0, 0],
      ['host-access', 32 * MiB + 8 * KiB, 0],
      ['guest-access', 32 * MiB + 136 * KiB, 0],
      ['hole', 32 * MiB + 136 * KiB, 0],
      ['convert-private', 136 * KiB, 0],
      ['convert-private-above', 136 * KiB, 0],
      ['guest-writes', 136 * KiB, 160 * MiB],
      ['private-read', 136 * KiB, 160 * MiB],
      ['convert-shared', 140 * KiB, 96 * MiB],
      ['convert-again', 136 * KiB, 96 * MiB],
      ['punch-hole', 136 * KiB, 64 * MiB + 4 * KiB],
    ],
    'bytes held after each step',
  );
  const byId = Object.fromEntries(steps.map((step) => [step.id, step]));
  t.match(byId['guest-access']?.numbers, { vcpu: 0, agentBytes: 128 * KiB, writtenBytes: 24 });
  t.match(byId['guest-writes']?.numbers, { vcpu: 0, allocatedBytes: 160 * MiB });
  t.match(byId['convert-private']?.numbers, { changedBytes: GiB, unchangedBytes: 0, freedBytes: 32 * MiB });
  t.match(byId['convert-shared']?.numbers, { changedBytes: 256 * MiB, freedBytes: 64 * MiB });
  t.match(byId['convert-again']?.numbers, { changedBytes: 256 * MiB, unchangedBytes: 768 * MiB, freedBytes: 4 * KiB });
  t.match(byId['punch-hole']?.numbers, { freedBytes: 32 * MiB });
  t.match(byId['private-read']?.refusal, { code: 'EFAULT', message: /704 MiB.*it is private/ });
  t.match(byId.hole?.refusal, { code: 'EFAULT', message: /3 GiB.*no memslot/ });
  t.same(
    byId['convert-again']?.memslots.map(({ address, size, privateBytes }) => [address, size, privateBytes]),
    [
      [0, 3 * GiB, GiB],
      [4 * GiB, GiB, 512 * MiB],
    ],
  );
  for (const { backend, kernel, vmType } of steps)
    t.same([backend, kernel, vmType], ['software', '7.3', 'sw-protected']);
});

t.test('the demo takes any memory and any kernel', async (t) => {
  for (const memory of ['8M', '100M', '3500M', '1.5G', '16GiB']) {
    const [part] = await partsHere(['--backend', 'software', '--memory', memory]);
    const sizes = part?.steps[0]?.memslots.map(({ size }) => size) ?? [];
    t.equal(
      sizes.reduce((sum, size) => sum + size, 0),
      part?.steps[0]?.numbers.memory,
      `${memory}: both regions together`,
    );
    t.ok((part?.steps.at(-1)?.numbers.freedBytes ?? 0) > 0, `${memory}: the hole gave something back`);
    let text = '';
    await demoAsText(
      demo(demoOptions(['--backend', 'software', '--memory', memory])),
      (_, word) => word,
      (more) => {
        text += more;
      },
    );
    t.ok(longestLine(text) <= 80, `${memory}: fits 80 columns`);
  }
  for (const kernel of [
    ['--kernel', '6.8'],
    ['--kernel', '6.18'],
    ['--arch', 'aarch64'],
    ['--arch', 'aarch64', '--kernel', '6.8'],
  ]) {
    const [part] = await partsHere([...kernel, '--type', 'default']);
    t.match(part, { vmType: 'default', privateMemory: false }, kernel.join(' '));
    t.match(part?.steps.at(-1), { id: 'convert-private', refusal: { code: 'UNSUPPORTED' } });
    t.ok((part?.steps.at(-2)?.numbers.freedBytes ?? 0) > 0, 'the hole gave something back');
  }
  const [old] = await partsHere(['--kernel', '6.8']);
  t.match(old, { vmType: 'sw-protected', privateMemory: true }, '6.8 had private memory');
});

t.test('the demo as text: plain in a pipe, and each step in it', async (t) => {
  const { status, out, err } = run(['demo', '--backend', 'software']);
  t.same([status, err], [0, '']);
  t.equal(out, stripVTControlCharacters(out), 'no colours');
  t.match(out, /━━ Software kernel, playing Linux 7\.3 on x86_64 · VM type sw-protected/);
  t.match(out, /shared with the host: {2}· nothing held {2}▄ part held {2}█ all held/, 'the legend');
  t.match(out, / {10}0 │▄·······░░░▓▓░{11}·{24}│ 3 GiB\n {6}4 GiB │▄·░░▒░░░░░······│ 5 GiB\n/, 'the map');
  t.match(out, /→ vCPU 0 reads 'hello below' and 'hello above'\n.*→ the host reads 'vCPU 0 below' and 'vCPU 0 above'/);
  t.match(out, /✗ cannot read guest memory .*: it is private \(EFAULT\)/);
  t.ok(longestLine(out) <= 80, 'fits 80 columns');
});

t.test('the demo where it starts', async (t) => {
  const parts = demoParts(t, []);
  t.equal(parts[0]?.backend, hasKvm ? 'kvm' : 'software');
  t.match(parts.at(-1), { privateMemory: true }, 'the private part is shown in any case');
  if (hasKvm && !parts[0]?.privateMemory) {
    t.match(parts[0]?.notes.join(), /no private memory here.*the private part follows on the software kernel/);
    t.match(parts[0]?.steps.at(-1)?.refusal, { code: 'UNSUPPORTED' });
    t.match(parts[1], { backend: 'software', notes: [/Simulated/] }, 'and says what it is');
    const ran = parts[0]?.steps.find(({ id }) => id === 'guest-access');
    t.match(ran, { refusal: null, numbers: { vcpu: 0 } }, 'a vCPU of the real KVM ran');
    const punched = parts[0]?.steps.find(({ id }) => id === 'punch-hole');
    t.equal(punched?.numbers.freedBytes, 32 * MiB, 'real memory was given back');
    const [only, ...others] = demoParts(t, ['--backend', 'kvm']);
    t.match([only, others], [{ backend: 'kvm' }, []], 'who asks for KVM gets nothing else');
  }
  const [part] = demoParts(t, ['--type', 'default']);
  t.match(part, { vmType: 'default', privateMemory: false });
  if (hasKvm) t.equal(JSON.parse(run(['probe', '--json']).out).backend, 'kvm');
});

t.test('a VM type that is not there', async (t) => {
  const tdx = run(['demo', '--backend', 'software', '--type', 'tdx']);
  t.same([tdx.status, tdx.out], [1, '']);
  t.match(
    tdx.err,
    /^guest-memfd: this host cannot create VMs of type 'tdx', which need an Intel.*; it has default, sw-protected\n$/,
  );
  const unknown = run(['demo', '--backend', 'software', '--type', 'nosuch']);
  t.equal(unknown.status, 2, 'a name that no host knows is a mistake in the command');
  t.match(unknown.err, /^guest-memfd: --type is one of default, sw-protected, .*; not 'nosuch'\n/);
  const debug = run(['demo', '--backend', 'software', '--type', 'tdx'], { env: { DEBUG: '1' } });
  t.match(debug.err, /\n {4}at .*createVm/, 'DEBUG adds the stack');
});

t.test('no device', async (t) => {
  const { status, out, err } = run(['probe', '--backend', 'kvm', '--device', '/nonexistent/kvm']);
  t.same([status, out], [1, '']);
  t.match(err, /^guest-memfd: (there is no \/nonexistent\/kvm: load the kvm|.*addon)/);
  t.match(err, /\nWithout it: guest-memfd probe --backend software\n$/);
  const auto = JSON.parse(run(['probe', '--json', '--device', '/nonexistent/kvm']).out);
  t.match(auto, { backend: 'software', fallbackReason: { code: 'UNSUPPORTED', message: /nonexistent|addon/ } });
  const text = run(['demo', '--device', '/nonexistent/kvm']);
  t.equal(text.status, 0);
  t.match(text.out, /KVM cannot be used: /);
  t.match(text.out, /Simulated/);
});

t.test('no permission', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'guest-memfd-'));
  t.teardown(() => rmSync(folder, { recursive: true }));
  const device = join(folder, 'kvm');
  writeFileSync(device, '', { mode: 0o000 });
  // Root may open anything, so it becomes somebody else, who must be able to get there.
  const asRoot = process.getuid?.() === 0;
  const ordinary = asRoot ? { uid: NOBODY, gid: NOBODY } : {};
  if (asRoot) spawnSync('chmod', ['755', folder]);
  if (run(['--version'], ordinary).status !== 0) return t.comment('not applicable: nobody cannot read this folder');
  const { status, out, err } = run(['demo', '--backend', 'kvm', '--device', device], ordinary);
  t.same([status, out], [1, '']);
  if (/addon/.test(err)) return t.comment('not applicable: there is no addon');
  t.match(err, /no permission on .*: join the group that owns it \(usually `sudo usermod -aG kvm \$USER`/);
  t.match(err, /EACCES/);
  t.match(err, /Without it: guest-memfd demo --backend software/);
  const auto = JSON.parse(run(['probe', '--json', '--device', device], ordinary).out);
  t.match(auto, { backend: 'software', fallbackReason: { code: 'EACCES' } });
  const examples = node([join(root, 'dist/examples/hello.js'), 'software'], ordinary);
  t.equal(examples.status, 0, 'an ordinary user can run an example');
});

t.test('what is no KVM', async (t) => {
  const { status, err } = run(['probe', '--backend', 'kvm', '--device', '/dev/null']);
  t.equal(status, 1);
  t.match(err, /\/dev\/null is not KVM|addon/);
});

t.test('a reader that goes away', async (t) => {
  for (const args of [
    ['demo', '--backend', 'software'],
    ['demo', '--backend', 'software', '--json'],
    ['probe'],
    ['help'],
  ]) {
    const child = spawn(process.execPath, [main, ...args], { cwd: root, env, stdio: ['ignore', 'pipe', 'pipe'] });
    child.stdout.destroy();
    let err = '';
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      err += text;
    });
    t.same([...(await once(child, 'close')), err], [0, null, ''], args.join(' '));
  }
});

t.test('colours on a terminal, and only there', async (t) => {
  const terminal = (command: string, more: Record<string, string> = {}): Ran =>
    ran(
      spawnSync('script', ['-qec', command, '/dev/null'], {
        cwd: root,
        encoding: 'utf8',
        env: { ...env, TERM: 'xterm-256color', ...more },
      }),
    );
  if (terminal('true').status !== 0) return t.comment('not applicable: there is no script(1) to make a terminal');
  const command = `'${process.execPath}' '${main}' demo --backend software`;
  const { status, out } = terminal(command);
  t.equal(status, 0);
  t.ok(out.includes('\x1b[35m▓\x1b[39m'), 'private memory is magenta');
  t.ok(out.includes('\x1b[32m▄\x1b[39m'), 'shared memory is green');
  const text = run(['demo', '--backend', 'software']).out;
  t.equal(stripVTControlCharacters(out).replaceAll('\r', ''), text, 'and the text is the same');
  for (const plain of [{ NO_COLOR: '1' }, { TERM: 'dumb' }])
    t.equal(terminal(command, plain).out.replaceAll('\r', ''), text, `none with ${Object.keys(plain)}`);
});

t.test('the command is a program', async (t) => {
  t.match(readFileSync(main, 'utf8'), /^#!\/usr\/bin\/env node\n/);
  const { status } = ran(spawnSync('/usr/bin/env', ['node', main, '--version'], { encoding: 'utf8', env }));
  t.equal(status, 0);
});

t.test('examples', async (t) => {
  const names = readdirSync(join(root, 'dist/examples')).filter((name) => name.endsWith('.js'));
  t.ok(names.length >= 3);
  const backends = [['--backend', 'software'], ...(hasKvm ? [[]] : [])];
  for (const name of names) {
    for (const args of backends) {
      const { status, out, err } = node([join(root, 'dist/examples', name), ...args]);
      t.same([status, err], [0, ''], `${name} ${args.join(' ')}`);
      t.ok(out.length > 0 && longestLine(out) <= 100, 'says something');
    }
  }
  const { out } = node([join(root, 'dist/examples/conversions-give-back.js'), 'software']);
  t.match(out, /convert\(\) gave back 92 MiB on the way and holds 64 MiB\./, 'never held twice');
  t.match(out, /Without the discard 48 MiB of 112 MiB are held twice\./);
  const hello = node([join(root, 'dist/examples/hello.js'), 'software']).out;
  t.match(hello, /hello, guest\n4096 bytes given back; private now: \[ \{ address: 16777216, size: 8388608 \} \]/);
  const printed = (name: string, args: readonly string[]): string => {
    const { out } = node([join(root, 'dist/examples', name), ...args]);
    t.ok(longestLine(out) <= 80, `${name} ${args.join(' ')} fits 80 columns`);
    return out;
  };
  const talk = printed('private-conversation.js', ['software']);
  t.match(talk, /host {3}is refused with EFAULT at 0x200000:\n.*it is private/);
  t.match(talk, /asks for shared: the answer is -13, the page is private\nguest {2}still reads 'swordfish'/);
  t.match(talk, /host {3}reads {2}'·{9}': what was private never comes out/);
  for (const args of backends) {
    const two = printed('two-vcpus.js', args);
    t.match(two, /received: 'one page seen by two vCPUs'; the mailbox was full 5 times/);
    t.match(two, /the lock was free for vCPU 0, and then vCPU 0's\nboth read the same memory: true/);
    const lock = printed('lock.js', args);
    t.match(lock, /not locked.*\n(.* MiB in memory\n){3}locked by this process: 1 MiB is in memory\n/);
    t.match(lock, /(back: EBUSY\n.*pass \d: faults of the guest \d+.*; 1 MiB in memory\n.*){3}/);
    t.match(lock, /moves: EBUSY\n.*goes: EBUSY\n.*again: EBUSY\nunlocked/);
    if (args.includes('software')) {
      t.match(lock, /pass 2: faults of the guest 256; 1 MiB/);
      t.match(lock, /back: EBUSY\n.*pass 3: faults of the guest 0; 1 MiB/);
    }
    const map = printed('who-touched-what.js', args);
    t.match(map, /RAM │·WWW·W··W·{4}W·{7}W·{12}W·{5}WWWW·{12}[x·]·{7}│/);
    t.match(map, /ROM, nothing │·{12}!!··\?{4} {3}!! {39}│/);
    t.match(map, /Asked again, it names 0\./);
  }
});

t.test('the map', async (t) => {
  const plain = (_: unknown, text: string): string => text;
  using kvm = Kvm.open({ backend: 'software' });
  using vm = kvm.createVm({ type: 'sw-protected' });
  const ram = kvm.createHostMemory({ size: MiB });
  const file = vm.createGuestMemfd({ size: MiB });
  vm.createMemslot({ address: 4 * GiB, size: 512 * KiB, hostMemory: ram, hostOffset: 512 * KiB, guestMemfd: file });
  vm.createMemslot({ address: 0, size: 128 * KiB, hostMemory: ram });
  const draw = (): string[] => drawMap(memoryMap(vm), plain).map((line) => line.trim());
  t.equal(memoryMap(vm).scale, 16 * KiB, 'a power of two, and the longest bar fits');
  t.same(draw(), [`0 │${'·'.repeat(8)}│ 128 KiB`, `4 GiB │${'·'.repeat(32)}│ 4096.5 MiB`], 'by address');
  vm.memory.write(4 * GiB, new Uint8Array(20 * KiB));
  t.match(draw()[1], /│█▄·{30}│/, 'all held and part held');
  vm.setMemoryAttributes({ address: 4 * GiB, size: 16 * KiB }, { private: true });
  t.match(draw()[1], /│!▄·/, 'what the guest no longer sees is held for nothing');
  t.match(drawLegend(memoryMap(vm), plain).join(), /! held on the side the guest does not see/);
  ram.discard({ offset: 512 * KiB, size: 16 * KiB });
  t.match(draw()[1], /│░▄·/);
  file.allocate({ offset: 0, size: 4 * KiB });
  t.match(draw()[1], /│▒▄·/);
  file.allocate({ offset: 0, size: 16 * KiB });
  t.match(draw()[1], /│▓▄·/);
});

t.test('words for numbers', async (t) => {
  t.same([0, 7, 4 * KiB, 32 * MiB + 8 * KiB, GiB].map(amount), ['0', '7 bytes', '4 KiB', '32 MiB + 8 KiB', '1 GiB']);
  t.same([0, 5, 4.25 * GiB, 2625 * MiB, 0xbffffffc].map(place), ['0', '0x5', '4.25 GiB', '2625 MiB', '0xbffffffc']);
  t.same([0, 8, 0x1000, 3 * GiB, GiB, 0xfff].map(code), ['0', '8', '4 * KiB', '3 * GiB', 'GiB', '0xfff']);
  t.same(
    wrap('a '.repeat(60).trim(), '  ', '> ').map((line) => line.length),
    [79, 43],
  );
});
