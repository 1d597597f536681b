// Guest code of any kind on the software kernel, which libunicorn carries out where it is installed.
import t, { type Test } from 'tap';
import { type Exit, Kvm, type ModelOptions, type Vcpu, type Vm } from '../lib/index.ts';
import { unicornLibrary } from '../lib/kernel/software/unicorn_engine.ts';
import { backends, errorOf, onKvm } from './backends.ts';
import { patience } from './pace.ts';

const KiB = 1024;
const ENTRY = 0x1000;
const SIZE = 256 * KiB;
/** Where no memslot is. */
const DEVICE = 0xe000_0000;
const x86: ModelOptions = { arch: 'x86_64', kernel: '7.3' };
const arm: ModelOptions = { arch: 'aarch64', kernel: '7.3', pageSize: 4096 };

interface Guest {
  readonly kvm: Kvm;
  readonly vm: Vm;
  readonly vcpu: Vcpu;
}

function guest(
  t: Test,
  code: readonly number[],
  registers: Record<string, bigint> = {},
  given: { readonly model?: ModelOptions; readonly backend?: 'kvm' } = {},
): Guest {
  const kvm = given.backend
    ? Kvm.open({ backend: 'kvm' })
    : Kvm.open({ backend: 'software', model: given.model ?? x86 });
  t.teardown(() => kvm.close());
  const vm = kvm.createVm();
  vm.createMemslot({ address: 0, size: SIZE, hostMemory: kvm.createHostMemory({ size: SIZE }) });
  vm.memory.write(ENTRY, Uint8Array.from(code));
  const vcpu = vm.createVcpu();
  const start = kvm.arch === 'aarch64' ? { pc: BigInt(ENTRY) } : real;
  vcpu.setRegisters({ ...start, ...registers });
  return { kvm, vm, vcpu };
}

const real = { rip: BigInt(ENTRY), rflags: 2n, 'cs.base': 0n, 'cs.selector': 0n };
const segments = ['cs', 'ds', 'es', 'ss'];
const flat32 = {
  ...Object.fromEntries(
    segments.flatMap((name) => [
      [`${name}.base`, 0n],
      [`${name}.limit`, 0xffff_ffffn],
      [`${name}.selector`, name === 'cs' ? 8n : 16n],
      [`${name}.type`, name === 'cs' ? 11n : 3n],
      [`${name}.present`, 1n],
      [`${name}.db`, 1n],
      [`${name}.s`, 1n],
      [`${name}.g`, 1n],
    ]),
  ),
  cr0: 0x11n,
};
const TABLES = 0x2_0000;
const long = { ...flat32, 'cs.l': 1n, 'cs.db': 0n, cr0: 0x8000_0011n, cr4: 0x20n, cr3: BigInt(TABLES), efer: 0x500n };

/** Maps the first 2 MiB to themselves, and the 2 MiB at 1 GiB to them too. */
function identityTables(vm: Vm): void {
  const entries: [number, number][] = [
    [TABLES, TABLES + 0x1003],
    [TABLES + 0x1000, TABLES + 0x2003],
    [TABLES + 0x1008, TABLES + 0x3003],
    [TABLES + 0x2000, 0x83],
    [TABLES + 0x3000, 0x83],
  ];
  for (const [at, value] of entries) {
    const bytes = new Uint8Array(8);
    new DataView(bytes.buffer).setBigUint64(0, BigInt(value), true);
    vm.memory.write(at, bytes);
  }
}

/** An exit without what is live, and an answer to what asks: the bytes 0x51, 0x52, … */
function step(vcpu: Vcpu): Record<string, unknown> {
  const exit: Exit = vcpu.run({ timeout: 2000 });
  if (exit.reason === 'io') {
    const { reason, direction, port, data } = exit;
    const seen = { reason, direction, port, data: direction === 'out' ? [...data] : data.length };
    if (direction === 'in') for (const index of data.keys()) data[index] = 0x51 + index;
    return seen;
  }
  if (exit.reason === 'mmio') {
    const { reason, address, isWrite, data } = exit;
    const seen = { reason, address, isWrite, data: isWrite ? [...data] : data.length };
    if (!isWrite) for (const index of data.keys()) data[index] = 0x51 + index;
    return seen;
  }
  return { reason: exit.reason };
}

function steps(vcpu: Vcpu): Record<string, unknown>[] {
  const seen = [];
  do seen.push(step(vcpu));
  while (seen.length < 50 && ['io', 'mmio'].includes(seen.at(-1)?.reason as string));
  return seen;
}

const out = (port: number, ...data: number[]): object => ({ reason: 'io', direction: 'out', port, data });
const store = (address: number, ...data: number[]): object => ({ reason: 'mmio', address, isWrite: true, data });
const load = (address: number, data: number): object => ({ reason: 'mmio', address, isWrite: false, data });
const input = (port: number, data: number): object => ({ reason: 'io', direction: 'in', port, data });
const hlt = { reason: 'hlt' };

/** Code that does the same on every CPU: what the host sees, and what is left in memory. */
const programs: readonly {
  readonly title: string;
  readonly code: readonly number[];
  readonly registers?: Record<string, bigint>;
  readonly paged?: boolean;
  readonly exits: readonly object[];
  readonly memory?: readonly (readonly [number, readonly number[]])[];
}[] = [
  {
    title: 'real mode: a loop over a text',
    // mov si, 0x1010; mov dx, 0x3f8; next: lodsb; test al, al; jz done; out dx, al; jmp next; done: hlt; nop
    code: [0xbe, 0x10, 0x10, 0xba, 0xf8, 0x03, 0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, 0xf4, 0x90, 72, 105, 0],
    exits: [out(0x3f8, 72), out(0x3f8, 105), hlt],
  },
  {
    title: 'real mode: what in reads is what the host answered',
    // in al, 0x10; out 0x11, al; in ax, 0x12; out 0x13, ax; hlt
    code: [0xe4, 0x10, 0xe6, 0x11, 0xe5, 0x12, 0xe7, 0x13, 0xf4],
    exits: [input(0x10, 1), out(0x11, 0x51), input(0x12, 2), out(0x13, 0x51, 0x52), hlt],
  },
  {
    title: 'real mode: segments, a stack, writes',
    // mov ax, 0x200; mov ds, ax; mov ss, ax; mov sp, 0x100; push 0x1234; mov [0x10], sp; call next; next: pop bx; mov [0x12], bx; hlt
    code: [
      0xb8, 0x00, 0x02, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x01, 0x68, 0x34, 0x12, 0x89, 0x26, 0x10, 0x00, 0xe8, 0x00,
      0x00, 0x5b, 0x89, 0x1e, 0x12, 0x00, 0xf4,
    ],
    exits: [hlt],
    memory: [
      [0x2010, [0xfe, 0x00, 0x14, 0x10]],
      [0x20fe, [0x34, 0x12]],
    ],
  },
  {
    title: 'real mode: a code segment with a base',
    // out 0x10, al; mov al, [0x4]; out 0x11, al; hlt
    code: [0xe6, 0x10, 0xa0, 0x04, 0x00, 0xe6, 0x11, 0xf4],
    registers: { rip: 0n, 'cs.base': BigInt(ENTRY), 'cs.selector': BigInt(ENTRY >> 4), rax: 7n },
    exits: [out(0x10, 7), out(0x11, 0), hlt],
  },
  {
    title: '32 bits: device registers read and written, and both by one instruction',
    // mov eax, [D]; mov [D+8], eax; mov cl, [D+0x101]; mov [0x3000], cl; inc dword [D+4]; hlt
    code: [
      0xa1, 0x00, 0x00, 0x00, 0xe0, 0xa3, 0x08, 0x00, 0x00, 0xe0, 0x8a, 0x0d, 0x01, 0x01, 0x00, 0xe0, 0x88, 0x0d, 0x00,
      0x30, 0x00, 0x00, 0xff, 0x05, 0x04, 0x00, 0x00, 0xe0, 0xf4,
    ],
    registers: flat32,
    exits: [
      load(DEVICE, 4),
      store(DEVICE + 8, 0x51, 0x52, 0x53, 0x54),
      load(DEVICE + 0x101, 1),
      load(DEVICE + 4, 4),
      store(DEVICE + 4, 0x52, 0x52, 0x53, 0x54),
      hlt,
    ],
    memory: [[0x3000, [0x51]]],
  },
  {
    title: '64 bits with paging: another linear address of the same page',
    // mov rax, 0x1122334455667788; mov [0x3000], rax; mov rbx, 0x40003000; inc byte [rbx]; mov r8, [0x3000]; mov [0x3008], r8; hlt
    code: [
      0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x48, 0x89, 0x04, 0x25, 0x00, 0x30, 0x00, 0x00, 0x48,
      0xc7, 0xc3, 0x00, 0x30, 0x00, 0x40, 0xfe, 0x03, 0x4c, 0x8b, 0x04, 0x25, 0x00, 0x30, 0x00, 0x00, 0x4c, 0x89, 0x04,
      0x25, 0x08, 0x30, 0x00, 0x00, 0xf4,
    ],
    registers: long,
    paged: true,
    exits: [hlt],
    memory: [
      [0x3000, [0x89, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x89, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]],
    ],
  },
  {
    title: '64 bits: what is not mapped and has no handler ends the guest',
    // mov rax, [0x200000]
    code: [0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00],
    registers: { ...long, 'idt.limit': 0n },
    paged: true,
    exits: [{ reason: 'shutdown' }],
  },
  {
    title: '64 bits: an instruction that is none, without a handler',
    code: [0x0f, 0x0b],
    registers: { ...long, 'idt.limit': 0n },
    paged: true,
    exits: [{ reason: 'shutdown' }],
  },
];

const library = unicornLibrary();
if (typeof library === 'string') {
  t.test('without libunicorn, the error says what to install', async (t) => {
    t.comment(`libunicorn cannot be tried here: ${library}`);
    const { vcpu } = guest(t, [0xf4]);
    const { code, message } = errorOf(() => vcpu.run());
    t.equal(code, 'UNSUPPORTED');
    t.match(message, /apt install libunicorn2/);
    t.ok(`Not here: ${message}`.length < 100 && !message.includes('\n'), message);
  });
} else {
  for (const { title, code, registers, paged, exits, memory = [] } of programs) {
    for (const backend of onKvm ? [undefined, 'kvm' as const] : [undefined]) {
      if (backend && backends[0]?.isArm) continue;
      t.test(`${title} (${backend ?? 'libunicorn'})`, async (t) => {
        const { vm, vcpu } = guest(t, code, registers, backend ? { backend } : {});
        if (paged) identityTables(vm);
        t.same(steps(vcpu), exits);
        for (const [at, bytes] of memory) {
          t.same([...vm.memory.read(at, bytes.length)], bytes, `memory at 0x${at.toString(16)}`);
        }
      });
    }
  }

  t.test('an endless loop ends at its deadline, and goes on from there', async (t) => {
    // inc eax; jmp to it
    const { vcpu } = guest(t, [0x66, 0x40, 0xeb, 0xfc]);
    const timeout = 50 * patience;
    const before = performance.now();
    t.equal(vcpu.run({ timeout }).reason, 'timeout');
    const elapsed = performance.now() - before;
    t.ok(elapsed >= timeout && elapsed < 20 * timeout, `${elapsed} ms`);
    const first = vcpu.getRegisters().rax ?? 0n;
    t.ok(first > 1000n);
    t.equal(vcpu.run({ timeout }).reason, 'timeout');
    t.ok((vcpu.getRegisters().rax ?? 0n) > first);
  });

  t.test('code that is none', async (t) => {
    t.equal(step(guest(t, [0x0f, 0xff, 0xff], { 'idt.limit': 0n }).vcpu).reason, 'shutdown');
    const handled = guest(t, [0x0f, 0xff, 0xff], { rsp: 0x8000n });
    // The vector of #UD, and its handler: pop ax; out 0x10, ax; hlt
    handled.vm.memory.write(24, Uint8Array.of(0x00, 0x20, 0x00, 0x00));
    handled.vm.memory.write(0x2000, Uint8Array.of(0x58, 0xe7, 0x10, 0xf4));
    t.same(steps(handled.vcpu), [out(0x10, 0x00, 0x10), hlt]);
  });

  t.test('a jump to where no memory is', async (t) => {
    // jmp 0xe0000000
    const { vcpu } = guest(t, [0xe9, 0xfb, 0xef, 0xff, 0xdf], flat32);
    t.equal(step(vcpu).reason, 'internal-error');
  });

  t.test('a string of bytes from a port', async (t) => {
    // mov di, 0x3000; mov cx, 3; mov dx, 0x20; rep insb; hlt
    const { vm, vcpu } = guest(t, [0xbf, 0x00, 0x30, 0xb9, 0x03, 0x00, 0xba, 0x20, 0x00, 0xf3, 0x6c, 0xf4]);
    t.same(steps(vcpu), [input(0x20, 1), input(0x20, 1), input(0x20, 1), hlt]);
    t.same([...vm.memory.read(0x3000, 4)], [0x51, 0x51, 0x51, 0]);
  });

  t.test('what the host changes between two exits is what the guest finds, code too', async (t) => {
    // mov al, [0x3000]; out 0x10, al; jmp to the start
    const { vm, vcpu } = guest(t, [0xa0, 0x00, 0x30, 0xe6, 0x10, 0xeb, 0xf9]);
    t.same(step(vcpu), out(0x10, 0));
    vm.memory.write(0x3000, Uint8Array.of(9));
    t.same(step(vcpu), out(0x10, 9));
    vm.memory.write(ENTRY + 4, Uint8Array.of(0x11));
    t.same(step(vcpu), out(0x11, 9));
    vcpu.setRegisters({ rip: BigInt(ENTRY + 3), rax: 5n });
    t.same(step(vcpu), out(0x11, 5));
  });

  t.test('an access of the wrong side is a memory fault, and a conversion takes effect', async (t) => {
    using kvm = Kvm.open({ backend: 'software', model: x86 });
    using vm = kvm.createVm({ type: 'sw-protected' });
    const file = vm.createGuestMemfd({ size: SIZE });
    vm.createMemslot({ address: 0, size: SIZE, guestMemfd: file, hostMemory: kvm.createHostMemory({ size: SIZE }) });
    // inc byte [0x3000]; mov al, [0x3000]; out 0x10, al; jmp to the start
    vm.memory.write(ENTRY, Uint8Array.of(0xfe, 0x06, 0x00, 0x30, 0xa0, 0x00, 0x30, 0xe6, 0x10, 0xeb, 0xf5));
    const vcpu = vm.createVcpu();
    vcpu.setRegisters(real);
    t.same(step(vcpu), out(0x10, 1));
    await vm.convert({ address: 0x3000, size: 4096 }, 'private');
    t.same(step(vcpu), out(0x10, 1), 'another page, of zeros');
    await vm.convert({ address: 0x3000, size: 4096 }, 'shared');
    t.same(step(vcpu).reason, 'io');
  });

  t.test('arm64: registers, a store to a device, a load from one, and the end', async (t) => {
    // str w1, [x2]; ldr x3, [x2, #8]; str x3, [x4]; movz x0, #0x8400, lsl #16; movk x0, #8; hvc #0
    const code = new Uint32Array([0xb9000041, 0xf9400443, 0xf9000083, 0xd2b08000, 0xf2800100, 0xd4000002]);
    const registers = { x1: 0x1_2233_4455n, x2: 0x900_0000n, x4: 0x3000n, pstate: 0x3c5n };
    const { vm, vcpu } = guest(t, [...new Uint8Array(code.buffer)], registers, { model: arm });
    t.same(step(vcpu), store(0x900_0000, 0x55, 0x44, 0x33, 0x22));
    t.same(step(vcpu), load(0x900_0008, 8));
    t.equal(step(vcpu).reason, 'system-event');
    t.same([...vm.memory.read(0x3000, 8)], [0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58]);
    t.equal(vcpu.getRegisters().x3, 0x5857_5655_5453_5251n);
  });
}
