{
  'variables': {
    # Extra compiler and linker flags; scripts/sanitize.mjs sets it to the sanitizers.
    'sanitize%': '',
  },
  'targets': [
    {
      'target_name': 'guest_memfd',
      'sources': [
        'native/addon.cc',
        'native/copy.cc',
        'native/direct_copy.cc',
        'native/environment.cc',
        'native/file.cc',
        'native/guest_memfd.cc',
        'native/interrupt.cc',
        'native/job.cc',
        'native/mapping.cc',
        'native/share.cc',
        'native/socket.cc',
        'native/struct.cc',
        'native/system.cc',
        'native/unicorn.cc',
        'native/vcpu.cc',
        'native/vcpu_run.cc',
        'native/vm.cc',
      ],
      'include_dirs': ['<!(node -p "require(\'node-addon-api\').include_dir")'],
      'defines': [
        'NAPI_VERSION=9',
        'NODE_ADDON_API_DISABLE_CPP_EXCEPTIONS',
        'NODE_ADDON_API_DISABLE_DEPRECATED',
        'NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS',
      ],
      'cflags': ['-Wall', '-Wextra', '-fvisibility=hidden'],
      'cflags_cc!': ['-std=gnu++17', '-std=gnu++20'],
      'cflags_cc': ['-std=c++17'],
      # nodelete: a finalizer or a signal may arrive after the worker that loaded the addon has gone.
      'ldflags': ['-Wl,-z,relro,-z,now', '-Wl,-z,nodelete'],
      'conditions': [
        ['sanitize!=""', {
          'cflags': ['<(sanitize)', '-fno-omit-frame-pointer', '-g'],
          'ldflags': ['<(sanitize)'],
        }],
      ],
    },
  ],
}
