import { accessSync, constants, existsSync, statSync } from 'node:fs';
import t, { type Test } from 'tap';
import { backendNames, onKvm } from './backends.ts';
import { child } from './lifecycle/child_process.ts';
import { times } from './pace.ts';

// Arguments that nobody would give in earnest, and memory that nobody may touch. Each part runs in a process of its own, because what it
// looks for ends a process by a signal.

/** Exit code 0, no signal; what it printed. */
async function result<T>(t: Test, program: string, ...args: string[]): Promise<T> {
  const { code, signal, output, errors } = await child(program, ...args);
  t.equal(signal, null, `${program} ${args.join(' ')}: no signal`);
  t.equal(code, 0, errors.slice(0, 2000));
  return JSON.parse(output || 'null') as T;
}

t.test('bad arguments to the objects', { jobs: 2 }, async (t) => {
  const variants = backendNames.flatMap((name) => [
    [name, 'default'],
    ...(name === 'software' ? [[name, 'sw-protected']] : []),
  ]);
  for (const [backend = '', type = ''] of variants) {
    t.test(`${backend}, ${type}`, async (t) => {
      const { calls, problems } = await result<{ calls: number; problems: string[] }>(
        t,
        'hostile_objects',
        backend,
        type,
      );
      t.ok(calls > times(6000, 60), `${calls} calls`);
      t.same(problems, []);
    });
  }
});

t.test('bad arguments to the boundary', async (t) => {
  for (const backend of backendNames) {
    const { calls, problems } = await result<{ calls: number; problems: string[] }>(t, 'hostile_kernel', backend);
    t.ok(calls > times(8000, 30), `${calls} calls`);
    t.same(problems, [], backend);
  }
});

t.test('memory that must not be touched', async (t) => {
  for (const backend of backendNames) {
    const codes = await result<Record<string, string>>(t, 'untouchable', backend);
    for (const [what, code] of Object.entries(codes)) {
      // The software kernel has read the file, and does not notice what others do to it.
      const own = backend === 'software' && what.startsWith('cut file');
      const fine = own || /^punched|old views|resident|discard|what is left/.test(what);
      const unsupported = what === 'not for the host: bytes';
      t.equal(code, fine ? 'ok' : unsupported ? 'UNSUPPORTED' : 'EFAULT', `${backend}: ${what}`);
    }
    t.ok(Object.keys(codes).length >= 30);
  }
});

t.test('a user who may not open /dev/kvm', async (t) => {
  const NOBODY = 65534;
  const closed = existsSync('/dev/kvm') && (statSync('/dev/kvm').mode & 0o006) !== 0o006;
  let needsRoot = process.getuid?.() === 0;
  try {
    accessSync('/dev/kvm', constants.R_OK | constants.W_OK);
  } catch {
    needsRoot = false;
  }
  const own = process.getuid?.() ?? 0;
  const user = needsRoot ? NOBODY : own;
  if (!closed || (!needsRoot && onKvm)) {
    t.pass('everybody here may, or nobody else can be tried');
    return;
  }
  const { refusal, backend, fallback } = await result<{
    refusal?: { name: string; code: string; message: string; syscall: string };
    backend: string;
    fallback: string | null;
  }>(t, 'without_permission', String(user));
  t.match(refusal, { name: 'KvmError', code: 'EACCES', syscall: 'open' });
  t.match(refusal?.message, /no permission on \/dev\/kvm.*usermod -aG kvm/);
  t.same([backend, fallback], ['software', 'EACCES']);
});
